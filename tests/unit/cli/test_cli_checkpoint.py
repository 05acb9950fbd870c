"""``ultrathink checkpoint``: what is inside, and the model as one file."""

import json
from pathlib import Path

import pytest
import torch

from tests.unit.cli.conftest import Say
from ultrathink import load_model
from ultrathink.core.errors import CheckpointError
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.loading import weights_from


def test_info_lists_what_a_checkpoint_holds(trained: RunFolder, say: Say) -> None:
    out = say("checkpoint", "info", "debug", "--tensors")
    for part in ("step 4,", "optimizer adamw, written by 1 process\n", "model/embedding.weight"):
        assert part in out
    assert "model-00001-of-00002.safetensors" in out
    assert "optimizer/embedding.weight/exp_avg" in out
    shown = json.loads(say("checkpoint", "info", "debug@2", "--json"))
    model, _ = load_model(trained.path)
    assert shown["parameters"] == sum(p.numel() for p in model.parameters())
    assert (shown["step"], shown["processes"]) == (2, 1)
    assert shown["size_bytes"] == sum(shown["files"].values())


def test_the_consolidated_model_is_that_of_the_run(trained: RunFolder, say: Say) -> None:
    out = say("checkpoint", "consolidate", "debug", "--output", "model")
    assert "ultrathink generate model" in out
    ours, tokenizer = load_model(trained.path)
    theirs, same = load_model("model")
    assert tokenizer.fingerprint == same.fingerprint
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, theirs.state_dict()[name]), name
    say("generate", "model", "the ", "--max-new-tokens", "3")
    assert weights_from("model", "runs") == (Path("model"), RunFolder(Path("model")))
    file = Path("model/model.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load_model("model")
