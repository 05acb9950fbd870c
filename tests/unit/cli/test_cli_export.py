"""``ultrathink export``, and training that begins with what it wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.unit.cli.conftest import Say
from tests.unit.interop.checkpoints import make_random_run, save_theirs, small_bpe
from tests.unit.runs.trained_runs import train
from ultrathink import load_model
from ultrathink.cli.main import main
from ultrathink.config.tokenizer import TOKENIZERS
from ultrathink.core import files
from ultrathink.core.registry import load_plugin
from ultrathink.data.tokenizers.byte import ByteTokenizer
from ultrathink.runs.folder import RunFolder

Out = pytest.CaptureFixture[str]
SMALL = (
    "data.seq_len=32",
    "data.train=[{type: dummy, num_documents: 60, num_words: 40}]",
    "training.batch_size=4",
    "training.max_steps=5",
    "training.sample.prompts=[]",
    "monitoring.sinks=[jsonl]",
)

_LETTERS = """
from ultrathink.config.tokenizer import TOKENIZERS
from ultrathink.core import files
from ultrathink.data.tokenizers.base import Tokenizer

@TOKENIZERS.register("letters")
class Letters(Tokenizer):
    type, eot_id, token_bytes = "letters", 26, [b"x"] * 27
    train = encode = encode_batch = None

    def _identity(self):
        return "letters"

    @classmethod
    def load(cls, folder, meta):
        return cls()
"""


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return make_random_run(tmp_path)


def test_an_export_says_where_it_is_and_how_to_load_it(run: RunFolder, say: Say) -> None:
    out = say("export", run.path)
    folder = run.path / "export" / "hf-step_00000007"
    assert f"Step 7 of {run.path}, a llama in float32: {folder}" in out
    assert f"AutoModelForCausalLM.from_pretrained('{folder}')" in out
    assert f"AutoTokenizer.from_pretrained('{folder}')" in out
    assert f"ultrathink train training.init_from=hf:{folder}" in out
    assert sorted(file.name for file in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "nothing beside it"
    written = json.loads((folder / "generation_config.json").read_text())
    assert written == {"eos_token_id": small_bpe().eot_id}


def test_a_program_reads_one_object(run: RunFolder, tmp_path: Path, say: Say) -> None:
    place = tmp_path / "out" / "model"
    words = ["--output", place, "--dtype", "bf16", "--format", "hf", "--json"]
    assert json.loads(say("export", f"{run.path}@7", *words)) == {
        "run": str(run.path),
        "checkpoint": str(run.path / "checkpoints" / "step_00000007"),
        "step": 7,
        "format": "hf",
        "path": str(place),
        "model_type": "llama",
        "dtype": "bfloat16",
        "tokenizer_class": "AutoTokenizer",
        "remarks": [],
    }
    assert all(t.dtype == torch.bfloat16 for t in load_file(place / "model.safetensors").values())


def test_a_trained_run_is_exported_as_it_is(tmp_path: Path, say: Say, capsys: Out) -> None:
    run = train(tmp_path, *SMALL, "training.checkpoint.every_steps=2")
    for which, step in (("last", 5), ("4", 4)):
        place = tmp_path / which
        words = ["--checkpoint", which, "--output", place, "--json"]
        assert json.loads(say("export", run.path, *words))["step"] == step
        ours, tokenizer = load_model(run.path, which)
        theirs = AutoModelForCausalLM.from_pretrained(place).eval()
        ids = torch.tensor([tokenizer.encode("a text to compare, and one more")])
        with torch.no_grad():
            torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)
    assert isinstance(tokenizer, ByteTokenizer)
    assert AutoTokenizer.from_pretrained(place).encode("é") == [0xC3, 0xA9]
    assert f"{place} exists already" in say("export", run.path, "--output", place, status=2)

    weights = next((run.checkpoints / "last").resolve().glob("model-00001*"))
    weights.write_bytes(b"\0" * weights.stat().st_size)
    assert main(["export", str(run.path), "--checkpoint", "last", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["step"] == 4
    assert "note: checkpoint step_00000005 is damaged" in err


def test_a_disk_that_does_not_take_it_leaves_nothing(
    run: RunFolder, tmp_path: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(files, "sync_file", fail)
    assert main(["export", str(run.path), "--output", str(tmp_path / "out" / "model")]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_what_no_family_has_is_one_message(tmp_path: Path, say: Say) -> None:
    run = make_random_run(tmp_path, feed_forward="relu2")
    message = say("export", run.path, status=2)
    assert "model.feed_forward is relu2, which no family of Hugging Face has" in message
    assert "model.feed_forward=swiglu" in message
    assert not (run.path / "export").exists()


def test_a_tokenizer_of_ones_own_stays_behind_with_a_remark(tmp_path: Path, capsys: Out) -> None:
    plugin = tmp_path / "letters.py"
    plugin.write_text(_LETTERS)
    load_plugin(plugin)
    try:
        tokenizer = TOKENIZERS.load("letters")()
        run = make_random_run(tmp_path, tokenizer)
        assert main(["export", str(run.path)]) == 0
    finally:
        del TOKENIZERS._entries["letters"]
    out, err = capsys.readouterr()
    assert "note: the tokenizer (Letters) cannot be written for transformers" in err
    assert "AutoTokenizer.from_pretrained" not in out
    files = [file.name for file in (run.path / "export" / "hf-step_00000007").iterdir()]
    assert sorted(files) == ["config.json", "generation_config.json", "model.safetensors"]


# -- and in ----------------------------------------------------------------------------------------


def test_training_begins_with_a_model_of_hugging_face(
    place: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ULTRATHINK_CACHE", str(place / "cache"))
    save_theirs(place / "theirs", "llama")
    assert main(["train", "debug", "training.init_from=hf:theirs", *SMALL, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["ending"], result["step"]) == ("finished", 5)
    assert result["bits_per_byte"] > 0
    model, tokenizer = load_model(result["run"])
    assert (model.config.hidden_size, tokenizer.vocab_size) == (48, 300)


def test_the_configuration_that_results_is_shown(place: Path, say: Say) -> None:
    save_theirs(place / "theirs", "qwen3")
    (place / "theirs" / "model.safetensors").unlink()  # it is not needed for this
    words = ("debug", "training.init_from=hf:theirs")
    shown = json.loads(say("config", "show", *words, "--json"))
    assert (shown["model"]["qk_norm"], shown["model"]["hidden_size"]) == (True, 48)
    assert shown["tokenizer"] == {"type": "hf", "vocab_size": 300}
    assert json.loads(say("config", "check", *words, "--json"))["parameters"] > 0
    wrong = say("config", "check", *words, "model.num_layers=9", status=2)
    assert "model.num_layers is 9" in wrong
