"""``ultrathink checkpoint``: what is inside, and the model as one file."""

import json
from pathlib import Path

import pytest
import torch

from tests.unit.runs.trained_runs import train
from ultrathink import load_model
from ultrathink.cli.main import main
from ultrathink.core.errors import CheckpointError
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.loading import weights_from

Out = pytest.CaptureFixture[str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.chdir(tmp_path)
    return train(tmp_path, "training.max_steps=2")


def test_info_lists_files_and_tensors(run: RunFolder, capsys: Out) -> None:
    assert main(["checkpoint", "info", str(run.path), "--tensors"]) == 0
    out = capsys.readouterr().out
    assert "step 2," in out
    assert "optimizer adamw, written by 1 process\n" in out
    assert "model-00001-of-00002.safetensors" in out
    assert "model/embedding.weight" in out
    assert "optimizer/embedding.weight/exp_avg" in out


def test_info_as_json_counts_the_parameters(run: RunFolder, capsys: Out) -> None:
    assert main(["checkpoint", "info", f"{run.path}@2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    model, _ = load_model(run.path)
    assert told["parameters"] == sum(p.numel() for p in model.parameters())
    assert (told["step"], told["processes"]) == (2, 1)
    assert told["size_bytes"] == sum(told["files"].values())


def test_the_consolidated_model_is_that_of_the_run(run: RunFolder, capsys: Out) -> None:
    assert main(["checkpoint", "consolidate", str(run.path), "--output", "model"]) == 0
    assert "ultrathink generate model" in capsys.readouterr().out
    ours, tokenizer = load_model(run.path)
    theirs, same = load_model("model")
    assert tokenizer.fingerprint == same.fingerprint
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, theirs.state_dict()[name]), name
    assert main(["generate", "model", "the ", "--max-new-tokens", "3"]) == 0


def test_a_run_may_begin_from_a_consolidated_model(run: RunFolder) -> None:
    assert main(["checkpoint", "consolidate", str(run.path), "--output", "model"]) == 0
    folder, parent = weights_from("model", "runs")
    assert (folder, parent) == (Path("model"), RunFolder(Path("model")))


def test_nothing_is_overwritten(run: RunFolder, capsys: Out) -> None:
    Path("model").mkdir()
    assert main(["checkpoint", "consolidate", str(run.path), "--output", "model"]) == 2
    assert "model exists already and is not overwritten" in capsys.readouterr().err


def test_a_damaged_file_is_named(run: RunFolder) -> None:
    main(["checkpoint", "consolidate", str(run.path), "--output", "model"])
    file = Path("model/model.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load_model("model")


def test_an_action_that_does_not_exist(run: RunFolder, capsys: Out) -> None:
    assert main(["checkpoint", "inf", str(run.path)]) == 2
    assert "there is no action 'inf'; did you mean info?" in capsys.readouterr().err


def test_a_newer_format_is_named(run: RunFolder, capsys: Out) -> None:
    path = run.checkpoint("last") / "state.json"
    path.write_text(path.read_text().replace('"format": 3', '"format": 99'))
    assert main(["checkpoint", "info", str(run.path)]) == 2
    told = capsys.readouterr().err
    assert "has format 99, this version reads 3 and 4; use the version of ultrathink" in told
