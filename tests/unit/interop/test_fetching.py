"""What ``hf:PATH_OR_NAME`` stands for: folders, downloads, and what each failure says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.interop.checkpoints import make_random_run
from tests.unit.interop.hub import COMMIT, NAME, serve
from ultrathink.core.errors import CheckpointError, MissingDependencyError
from ultrathink.interop.export import export_run
from ultrathink.interop.fetching import find_folder, is_pretrained

# Where the library looks and keeps things is settled when it is imported, so it needs a process.
_FETCH = """
import sys
from ultrathink.core.errors import UltrathinkError
from ultrathink.interop.fetching import find_folder
try:
    print(find_folder(sys.argv[1], with_weights=sys.argv[2] == "weights"))
except UltrathinkError as error:
    print("refused:", error)
"""


def fetch(home: Path, text: str, *, endpoint: str, weights: bool = True, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _FETCH, text, "weights" if weights else "none"],
        env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), **env},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_which_texts_are_meant(tmp_path: Path) -> None:
    found = [is_pretrained(text) for text in ("hf:someone/model", "runs/demo", None)]
    assert found == [True, False, False]
    assert find_folder(f"hf:{tmp_path}", with_weights=True) == tmp_path


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere/deep/down is not there; name a folder"):
        find_folder("hf:nowhere/deep/down", with_weights=True)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file is a file; name a folder with config\.json"):
        find_folder(f"hf:{tmp_path / 'file'}", with_weights=True)


def test_a_download_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "ultrathink\[hf\]"'):
        find_folder("hf:someone/model", with_weights=True)


def test_a_model_is_downloaded_and_kept(tmp_path: Path) -> None:
    folder = export_run(str(make_random_run(tmp_path).path)).folder
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    home, asked = tmp_path / "home", []
    with serve(folder, asked) as endpoint:
        described = Path(fetch(home, f"hf:{NAME}", endpoint=endpoint, weights=False))
        names = {file.name for file in described.iterdir()}
        assert {"config.json", "tokenizer.json"} <= names
        assert "model.safetensors" not in names
        whole = Path(fetch(home, f"hf:{NAME}@{COMMIT}", endpoint=endpoint))
    assert whole == described
    assert not any("pytorch_model.bin" in path for path in asked), "nothing pickled is fetched"
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (whole / name).read_bytes() == (folder / name).read_bytes()
    gone = fetch(home, f"hf:{NAME}", endpoint="http://127.0.0.1:9")
    assert Path(gone) == whole, "what was fetched needs no connection"


def test_what_each_failure_says(tmp_path: Path) -> None:
    with serve(tmp_path, []) as endpoint:
        for text, said in {
            "hf:someone/else": "no model of Hugging Face called someone/else; a private one",
            "hf:someone/gated": "access is restricted",
            f"hf:{NAME}@nowhere": "the model has no revision 'nowhere'",
            "hf:some--one/else": "the download failed (",
        }.items():
            message = fetch(tmp_path / "home", text, endpoint=endpoint)
            assert message.startswith(f"refused: {text}: ")
            assert said in message
            assert "\n" not in message


def test_without_a_connection(tmp_path: Path) -> None:
    message = fetch(tmp_path, "hf:someone/else", endpoint="http://127.0.0.1:9")
    assert "not on this machine, and Hugging Face cannot be reached" in message
    assert "\n" not in message
