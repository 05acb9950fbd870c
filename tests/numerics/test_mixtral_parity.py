"""Experts compared with Mixtral's of ``transformers``: logits, gradients, text, and both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

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
)
from ultrathink import load_model
from ultrathink.core.errors import CheckpointError, ConfigError
from ultrathink.interop.export import export_run
from ultrathink.interop.importing import load_pretrained, open_pretrained
from ultrathink.model.transformer import Transformer
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.loading import empty_model

SHAPES: dict[str, dict[str, Any]] = {
    "8 top-2": {},
    "4 top-3, stretched": {
        "num_local_experts": 4,
        "num_experts_per_tok": 3,
        "num_hidden_layers": 3,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4},
    },
    "5 top-5": {"num_local_experts": 5, "num_experts_per_tok": 5, "intermediate_size": 24},
    "1 top-1": {"num_local_experts": 1, "num_experts_per_tok": 1},
}
THEIR_KERNELS = ("eager", "grouped_mm", "batched_mm")
OUR_KERNELS = ("batched", "grouped_mm", "loop")
MOE: dict[str, Any] = {
    "groups": [{"name": "mine", "num_experts": 6, "top_k": 2}],
    "intermediate_size": 40,
}


def make_ours(folder: Path, backend: str) -> Transformer:
    """The model in ``folder``, its experts computed by ``backend``."""
    pretrained = open_pretrained(f"hf:{folder}")
    moe = pretrained.model.moe
    assert moe is not None
    moe = moe.model_copy(update={"backend": backend})
    model = empty_model(pretrained.model.model_copy(update={"moe": moe}))
    pretrained.load_into(model)
    return model.eval()


# -- the same model --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", OUR_KERNELS)
@pytest.mark.parametrize("name", list(SHAPES))
def test_logits_equal_theirs(tmp_path: Path, name: str, backend: str) -> None:
    theirs = save_theirs(tmp_path, "mixtral", **SHAPES[name])
    ours = make_ours(tmp_path, backend)
    for kernel in THEIR_KERNELS:
        theirs.set_experts_implementation(kernel)
        assert_same_logits(ours, theirs)


@pytest.mark.parametrize("backend", OUR_KERNELS)
@pytest.mark.parametrize("name", ["8 top-2", "4 top-3, stretched"])
def test_gradients_equal_theirs(tmp_path: Path, name: str, backend: str) -> None:
    theirs = save_theirs(tmp_path, "mixtral", **SHAPES[name])
    theirs.set_experts_implementation("eager")
    ours = make_ours(tmp_path, backend).train()
    ids, labels = make_ids(40), make_ids(41)[:, 1:]
    out = ours(ids, labels)
    out.loss.backward()
    loss = F.cross_entropy(theirs(ids).logits.flatten(0, 1), labels.flatten(), reduction="sum")
    loss.backward()
    torch.testing.assert_close(out.loss, loss)
    for number, block in enumerate(ours.blocks):
        there = theirs.model.layers[number]
        for here, other in (
            (block.feed_forward.experts.gate_up, there.mlp.experts.gate_up_proj),
            (block.feed_forward.experts.down, there.mlp.experts.down_proj),
            (block.feed_forward.router.weight, there.mlp.gate.weight),
            (block.feed_forward_norm.weight, there.post_attention_layernorm.weight),
            (block.attention.output.weight, there.self_attn.o_proj.weight),
        ):
            assert other.grad.abs().max() > 1e-2, "the comparison needs gradients"
            scale = other.grad.abs().max().item()
            torch.testing.assert_close(here.grad, other.grad, atol=1e-5 * scale, rtol=1e-4)


# -- in --------------------------------------------------------------------------------------------


def rename(folder: Path, old: str, new: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name.replace(old, new): tensors[name] for name in tensors}, folder / "model.safetensors"
    )


@pytest.mark.parametrize("layout", ["theirs inside", "each expert, newer place", "several files"])
def test_each_layout_that_transformers_reads_is_read(tmp_path: Path, layout: str) -> None:
    theirs = save_theirs(tmp_path, "mixtral")
    here = make_ours(tmp_path, "batched").state_dict()
    if layout == "theirs inside":
        theirs.save_pretrained(tmp_path, save_original_format=False)
        names = load_file(tmp_path / "model.safetensors").keys()
        assert "model.layers.0.mlp.experts.gate_up_proj" in names
    elif layout == "several files":
        theirs.save_pretrained(tmp_path, max_shard_size="100KB")
        (tmp_path / "model.safetensors").unlink()
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    else:
        rename(tmp_path, ".block_sparse_moe.", ".mlp.")
    assert_same_logits(load_theirs(tmp_path), theirs)
    for name, tensor in make_ours(tmp_path, "batched").state_dict().items():
        assert torch.equal(tensor, here[name]), name


def test_routing_is_as_it_was_after_an_import(tmp_path: Path) -> None:
    save_theirs(tmp_path, "mixtral")
    ours, _ = load_pretrained(f"hf:{tmp_path}")
    assert ours.routing is not None
    ours.routing.warm_up(1)  # a trained router is not made uniform first
    values = [ours.routing.get(name) for name in ("warmup", "temperature", "jitter", "bias_rate")]
    assert values == [1.0, 1.0, 0.0, 0.0]
    for layer in ours.expert_layers().values():
        assert layer.router.active.tolist() == [True] * 8
        assert not layer.router.selection_bias.any()


def test_experts_that_do_not_fit_the_description_are_named(tmp_path: Path) -> None:
    save_theirs(tmp_path, "mixtral")
    change_config(tmp_path, num_local_experts=7)
    with pytest.raises(CheckpointError, match=r"experts\.7\.w1\.weight, which is not part of the"):
        load_pretrained(f"hf:{tmp_path}")
    change_config(tmp_path, num_local_experts=8)
    rename(tmp_path, "layers.1.block_sparse_moe.experts.7.w3", "layers.1.gone")
    with pytest.raises(CheckpointError, match=r"no weight model\.layers\.1\.block_sparse_moe\.exp"):
        load_pretrained(f"hf:{tmp_path}")


# -- out -------------------------------------------------------------------------------------------


def export_changed(place: Path, moe: dict[str, Any], changes: dict[str, Any]) -> tuple[Any, Any]:
    """A random model of ours with buffers changed, and the export of a run that holds it."""
    run = make_random_run(place / "first", moe=moe)
    model, _ = load_model(run.path)
    state = model.state_dict()
    for name, value in changes.items():
        state[name].copy_(torch.as_tensor(value))
    run = make_run(place, model.config, small_bpe(), state)
    return load_model(run.path)[0], export_run(str(run.path))


def test_ours_is_theirs_after_an_export(tmp_path: Path) -> None:
    ours, done = export_changed(tmp_path, MOE, {})
    assert (done.model_type, done.remarks) == ("mixtral", ())
    assert_same_logits(ours, load_theirs(done.folder))
    config = json.loads((done.folder / "config.json").read_text())
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (6, 2)
    assert (config["intermediate_size"], config["sliding_window"]) == (40, None)
    assert "model.layers.1.block_sparse_moe.experts.5.w2.weight" in load_file(
        done.folder / "model.safetensors"
    )
    again, _ = load_pretrained(f"hf:{done.folder}")
    parameters = dict(again.named_parameters())
    for name, tensor in ours.named_parameters():
        assert torch.equal(parameters[name], tensor), name


@pytest.mark.parametrize(
    ("changes", "remarks"),
    [
        ({"routing.temperature": 0.3}, ["temperature of 0.3"]),
        (
            {"routing.warmup": 0.4, "routing.temperature": 2.0},
            ["temperature of 2", "warmup of 0.4"],
        ),
    ],
)
def test_live_controls_are_worked_into_the_router(
    tmp_path: Path, changes: dict[str, float], remarks: list[str]
) -> None:
    ours, done = export_changed(tmp_path, MOE, changes)
    assert len(done.remarks) == len(remarks)
    for remark, words in zip(done.remarks, remarks, strict=True):
        assert words in remark
    assert_same_logits(ours, load_theirs(done.folder))
    plain, _ = load_pretrained(f"hf:{export_changed(tmp_path / 'plain', MOE, {})[1].folder}")
    assert (logits_of(plain, make_ids()) - logits_of(ours, make_ids())).abs().max() > 1e-2


@pytest.mark.parametrize(
    "moe",
    [
        {"groups": [{**MOE["groups"][0], "max_experts": 9}], "intermediate_size": 40},
        {"groups": [{"name": "a", "num_experts": 1, "top_k": 1}], "intermediate_size": 64},
        {
            "groups": [{"name": "a", "num_experts": 3, "top_k": 3}],
            "intermediate_size": 64,
            "normalize_gates": False,
            "layers": [0, 1],
        },
    ],
)
def test_what_is_a_mixtral_under_another_name(tmp_path: Path, moe: dict[str, Any]) -> None:
    """Empty slots are left out of the export."""
    ours, done = export_changed(tmp_path, moe, {})
    theirs = load_theirs(done.folder)
    assert theirs.config.num_local_experts == moe["groups"][0]["num_experts"]
    assert_same_logits(ours, theirs)


ACTIVE = "blocks.{}.feed_forward.router.active"
PRUNED = {
    ACTIVE.format(0): [True, True, True, True, False, True],
    ACTIVE.format(1): [False, True, True, True, True, True],
}


def test_as_many_experts_as_every_layer_has_are_exported(tmp_path: Path) -> None:
    """Whichever slots they are in."""
    ours, done = export_changed(tmp_path, MOE, PRUNED)
    theirs = load_theirs(done.folder)
    assert theirs.config.num_local_experts == 5
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {ACTIVE.format(1): PRUNED[ACTIVE.format(1)]},
            r"layer 0: 6, layer 1: 5\), and Mixtral has",
        ),
        (
            {"blocks.1.feed_forward.router.branch": [[0] * 6, [1] + [0] * 5] + [[0] * 6] * 4},
            "experts in layer 1 are split, which Mixtral lacks",
        ),
    ],
)
def test_layers_that_mixtral_cannot_have_are_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        export_changed(tmp_path, MOE, changes)
    run = RunFolder(next((tmp_path / "runs").iterdir()))
    assert not (run.path / "export").exists()
    assert str(run.path) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"blocks.1.feed_forward.router.selection_bias": [0.0, 0.0, 0.0, -0.25, 0.0, 0.0]},
            ["router.selection_bias is up to 0.25", "model.moe.balance.bias_rate=0"],
        ),
    ],
)
def test_a_choice_of_experts_that_mixtral_does_not_make_is_refused(
    tmp_path: Path, changes: dict[str, Any], said: list[str]
) -> None:
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        export_changed(tmp_path, MOE, changes)
    run = RunFolder(next((tmp_path / "runs").iterdir()))
    assert not (run.path / "export").exists()
    for words in (*said, *changes, str(run.path)):
        assert words in str(caught.value)
