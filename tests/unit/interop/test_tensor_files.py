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


def test_a_weight_that_is_missing(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    assert "has no weight model.layers.1.mlp.up_proj.weight" in refused(folder)


def test_a_weight_too_much(folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    change_weights(folder, lambda weights: weights.update({name: torch.ones(48)}))
    assert f"holds {name}, which no model of its config.json has" in refused(folder)


def test_frequencies_that_old_checkpoints_hold_are_left_aside(folder: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_weights(folder, lambda weights: weights.update({name: torch.ones(4)}))
    load_pretrained(f"hf:{folder}")


def test_a_weight_of_another_shape(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.update({"lm_head.weight": torch.ones(8, 48)}))
    assert "lm_head.weight is [8, 48], and its config.json makes it [300, 48]" in refused(folder)


def test_quantized_weights(folder: Path) -> None:
    whole = torch.ones(300, 48, dtype=torch.int8)
    change_weights(folder, lambda weights: weights.update({"lm_head.weight": whole}))
    assert "lm_head.weight holds numbers of type I8" in refused(folder)


def test_a_head_that_is_said_to_be_shared(folder: Path) -> None:
    change_config(folder, tie_word_embeddings=True)
    assert "tie_word_embeddings is true, but lm_head.weight is not the embedding" in refused(folder)
    change_weights(
        folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()})
    )
    assert load_pretrained(f"hf:{folder}")[0].head is None


def test_a_torn_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert "model.safetensors cannot be read" in refused(folder)


def test_pickled_weights_are_not_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = refused(folder)
    assert "has its weights in pytorch_model.bin, which is pickled" in message
    assert "save_pretrained" in message


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in refused(folder)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("{}", "has no weight_map"),
        ('{"weight_map": {"a": 1}}', "has no weight_map"),
        ("[]", "is not a JSON object"),
        ("{", "cannot be read"),
        ('{"weight_map": {"a": "../b.safetensors"}}', "'../b.safetensors', which is not a file of"),
        ('{"weight_map": {"a": "b.safetensors"}}', "b.safetensors is missing"),
    ],
)
def test_an_index_that_leads_nowhere(folder: Path, index: str, said: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    assert said in refused(folder)


def test_an_index_that_names_what_a_file_lacks(folder: Path) -> None:
    names = list(load_file(folder / "model.safetensors"))
    change_weights(folder, lambda weights: weights.pop("lm_head.weight"))
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    index = {"weight_map": dict.fromkeys(names, "one.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "one.safetensors cannot be read" in refused(folder)


def test_a_folder_without_a_description(folder: Path) -> None:
    (folder / "config.json").unlink()
    message = refused(folder)
    assert "has no config.json" in message
    assert "without hf:" in message
