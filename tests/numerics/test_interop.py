"""Models that come from Hugging Face and go there: equal logits, and bits that come back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.unit.interop.checkpoints import (
    assert_same_logits,
    change_config,
    load_theirs,
    logits_of,
    make_ids,
    make_random_run,
    make_run,
    save_theirs,
    small_bpe,
    to_older_layout,
)
from ultrathink import load_model
from ultrathink.interop.export import export_run
from ultrathink.interop.families import SHAPE
from ultrathink.interop.importing import load_pretrained, open_pretrained
from ultrathink.model.transformer import Transformer

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn with its own betas": YARN | {"beta_fast": 24.0, "beta_slow": 2.0},
    "yarn with its own scale": YARN | {"attention_factor": 1.25},
    "yarn with mscale": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7},
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, all heads": ("llama", {"num_key_value_heads": 6, "rms_norm_eps": 1e-3}),
    "mistral": ("mistral", {}),
    "mistral, wide heads": ("mistral", {"hidden_size": 44, "head_dim": 16}),
    "mistral, windowed beyond the text": ("mistral", {"sliding_window": 130}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "mixtral, tied, windowed beyond the text": (
        "mixtral",
        {"tie_word_embeddings": True, "sliding_window": 130, "rms_norm_eps": 1e-3},
    ),
}


def state_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_bits(here: dict[str, Tensor], there: dict[str, Tensor]) -> None:
    assert here.keys() == there.keys()
    for name, tensor in here.items():
        assert tensor.dtype == there[name].dtype, name
        assert torch.equal(tensor, there[name]), name


# -- in -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(FAMILIES))
def test_imported_logits_equal_theirs(tmp_path: Path, name: str) -> None:
    kind, changes = FAMILIES[name]
    theirs = save_theirs(tmp_path, kind, **changes)
    ours, tokenizer = load_pretrained(f"hf:{tmp_path}")
    assert_same_logits(ours, theirs)
    assert tokenizer.eot_id == small_bpe().eot_id


@pytest.mark.parametrize(("kind", "layout"), [("llama", "newer"), ("qwen2", "older")])
@pytest.mark.parametrize("name", list(SCALINGS))
def test_stretched_positions_are_imported(
    tmp_path: Path, name: str, kind: str, layout: str
) -> None:
    theirs = save_theirs(tmp_path, kind, rope_parameters={"rope_theta": 5e4, **SCALINGS[name]})
    if layout == "older":
        to_older_layout(tmp_path)
    ours, _ = load_pretrained(f"hf:{tmp_path}")
    assert_same_logits(ours, theirs)
    if name == "default":
        return
    change_config(tmp_path, "rope_parameters", "rope_scaling", rope_theta=5e4)
    plain, _ = load_pretrained(f"hf:{tmp_path}")
    difference = logits_of(plain, make_ids(120)) - logits_of(ours, make_ids(120))
    assert difference.abs().max() > 1e-2, "the stretching must matter"


# -- out ------------------------------------------------------------------------------------------

OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "own head": ("llama", {"tie_embeddings": False, "norm_eps": 1e-3, "rope_theta": 5e4}),
    "wide heads": ("llama", {"head_dim": 16}),
    "a width that heads do not divide": ("mistral", {"hidden_size": 44, "head_dim": 16}),
    "biases": ("qwen2", {"qkv_bias": True}),
    "norms": ("qwen3", {"qk_norm": True}),
    "linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 3.0}}),
    "llama3": (
        "llama",
        {"rope_scaling": {"type": "llama3", "factor": 8.0, "original_max_positions": 64}},
    ),
    "yarn": (
        "qwen3",
        {
            "qk_norm": True,
            "rope_scaling": {
                "type": "yarn",
                "factor": 4.0,
                "original_max_positions": 32,
                "beta_fast": 24.0,
                "attention_factor": 1.25,
            },
        },
    ),
}


@pytest.mark.parametrize("name", list(OURS))
def test_exported_logits_equal_ours_and_all_comes_back(tmp_path: Path, name: str) -> None:
    kind, changes = OURS[name]
    run = make_random_run(tmp_path, **changes)
    ours, _ = load_model(run.path)
    done = export_run(str(run.path))
    assert (done.model_type, done.dtype, done.step) == (kind, "float32", 7)
    assert_same_logits(ours, load_theirs(done.folder))
    again, tokenizer = load_pretrained(f"hf:{done.folder}")
    assert_same_bits(dict(again.state_dict()), dict(ours.state_dict()))
    was, now = ours.config.model_dump(), again.config.model_dump()
    assert {key: now[key] for key in SHAPE if key != "max_positions"} == {
        key: was[key] for key in SHAPE if key != "max_positions"
    }
    assert tokenizer.definition == small_bpe().definition


@pytest.mark.parametrize("name", [name for name in FAMILIES if "windowed" not in name])
def test_their_weights_go_through_us_bit_for_bit(tmp_path: Path, name: str) -> None:
    kind, changes = FAMILIES[name]
    rope = LLAMA3 | {"rope_theta": 5e4}
    theirs = save_theirs(tmp_path / "theirs", kind, rope_parameters=rope, **changes)
    ours, tokenizer = load_pretrained(f"hf:{tmp_path / 'theirs'}")
    run = make_run(tmp_path, ours.config, tokenizer, ours.state_dict())
    done = export_run(str(run.path), output=tmp_path / "ours")
    assert_same_bits(state_of(done.folder), state_of(tmp_path / "theirs"))
    assert_same_logits(load_theirs(done.folder), theirs)
    again = open_pretrained(f"hf:{done.folder}")
    assert again.model == ours.config
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (done.folder / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()


def test_an_export_in_bf16_holds_the_rounded_weights(tmp_path: Path) -> None:
    run = make_random_run(tmp_path)
    whole, half = export_run(str(run.path)), export_run(str(run.path), dtype="bf16")
    assert half.folder.name == "hf-step_00000007-bf16"
    assert half.dtype == "bfloat16"
    rounded = {name: tensor.bfloat16() for name, tensor in state_of(whole.folder).items()}
    assert_same_bits(state_of(half.folder), rounded)
    assert load_theirs(half.folder).dtype == torch.bfloat16
    ours, _ = load_pretrained(f"hf:{half.folder}")
    assert ours.dtype == torch.float32
    assert torch.equal(ours.norm.weight, rounded["model.norm.weight"].float())


def test_a_run_in_fp64_keeps_its_precision(tmp_path: Path) -> None:
    config = make_random_run(tmp_path).read_config().model
    model = Transformer(config).double()
    run = make_run(tmp_path / "other", config, small_bpe(), model.state_dict())
    done = export_run(str(run.path))
    assert done.dtype == "float64"
    assert torch.equal(state_of(done.folder)["model.norm.weight"], model.norm.weight)
    assert json.loads((done.folder / "config.json").read_text())["torch_dtype"] == "float64"
