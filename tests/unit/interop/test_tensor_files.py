"""Folders of weights that are damaged, foreign or not what their ``config.json`` says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.interop.checkpoints import change_config, make_random_run
from ultrathink.core.errors import CheckpointError
from ultrathink.interop.export import export_run
from ultrathink.interop.importing import load_pretrained


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with its own head."""
    run = make_random_run(tmp_path, tie_embeddings=False)
    return export_run(str(run.path)).folder


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(f"hf:{folder}")
    assert str(folder) in str(caught.value)
    return str(caught.value)


def torn(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def lacking_what_the_index_names(folder: Path) -> None:
    names = list(load_file(folder / "model.safetensors"))
    change_weights(folder, lambda weights: weights.pop("lm_head.weight"))
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    index = {"weight_map": dict.fromkeys(names, "one.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def without(name: str) -> Callable[[Path], Any]:
    return lambda folder: change_weights(folder, lambda weights: weights.pop(name))


def holding(name: str, value: torch.Tensor) -> Callable[[Path], Any]:
    return lambda folder: change_weights(folder, lambda weights: weights.update({name: value}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (without("model.layers.1.mlp.up_proj.weight"), ["has no weight model.layers.1.mlp.up_pro"]),
        (
            holding("model.layers.0.self_attn.q_proj.bias", torch.ones(48)),
            ["holds model.layers.0.self_attn.q_proj.bias, which is not part of the model"],
        ),
        (
            holding("lm_head.weight", torch.ones(8, 48)),
            ["lm_head.weight is [8, 48], but its config.json makes it [300, 48]"],
        ),
        (
            holding("lm_head.weight", torch.ones(300, 48, dtype=torch.int8)),
            ["lm_head.weight holds numbers of type I8"],
        ),
        (torn, ["model.safetensors cannot be read"]),
        (pickled, ["has its weights in pytorch_model.bin, which is pickled", "save_pretrained"]),
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            ["neither model.safetensors nor model.safetensors.index.json"],
        ),
        (lacking_what_the_index_names, ["one.safetensors cannot be read"]),
        (
            lambda folder: (folder / "config.json").unlink(),
            ["has no config.json", "without hf:"],
        ),
    ],
)
def test_what_cannot_be_read_is_named(
    folder: Path, damage: Callable[[Path], Any], said: list[str]
) -> None:
    damage(folder)
    message = refused(folder)
    for words in said:
        assert words in message


def test_frequencies_that_old_checkpoints_hold_are_left_aside(folder: Path) -> None:
    holding("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4))(folder)
    load_pretrained(f"hf:{folder}")


def test_a_head_that_is_said_to_be_shared(folder: Path) -> None:
    change_config(folder, tie_word_embeddings=True)
    assert "tie_word_embeddings is true, but lm_head.weight is not the embedding" in refused(folder)
    change_weights(
        folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()})
    )
    assert load_pretrained(f"hf:{folder}")[0].head is None


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("{}", "has no weight_map"),
        ("[]", "is not a JSON object"),
        ('{"weight_map": {"a": "../b.safetensors"}}', "'../b.safetensors', which is not a file of"),
        ('{"weight_map": {"a": "b.safetensors"}}', "b.safetensors is missing"),
    ],
)
def test_an_index_that_leads_nowhere(folder: Path, index: str, said: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    assert said in refused(folder)
