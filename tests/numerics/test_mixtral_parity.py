"""Experts compared with Mixtral's of ``transformers``: logits, gradients, text, and both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.unit.interop.checkpoints import (
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
    "24 top-2, narrow": {"num_local_experts": 24, "intermediate_size": 8},
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


@torch.no_grad()
def logits_of(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(ids).logits
    assert logits.std() > 0.5, "the comparison needs logits that differ"
    return logits


def assert_same_logits(ours: Any, theirs: Any) -> None:
    ids = make_ids(120)
    torch.testing.assert_close(logits_of(ours, ids), logits_of(theirs, ids), atol=1e-5, rtol=1e-5)


def load_theirs(folder: Path) -> Any:
    from transformers import MixtralForCausalLM

    return MixtralForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


# -- the same model --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", OUR_KERNELS)
@pytest.mark.parametrize("name", list(SHAPES))
def test_logits_equal_theirs(tmp_path: Path, name: str, backend: str) -> None:
    theirs = save_theirs(tmp_path, "mixtral", **SHAPES[name])
    ours = make_ours(tmp_path, backend)
    for kernel in THEIR_KERNELS:
        theirs.set_experts_implementation(kernel)
        assert_same_logits(ours, theirs)


def test_the_comparison_sees_every_expert_and_which_are_chosen(tmp_path: Path) -> None:
    theirs = save_theirs(tmp_path, "mixtral")
    ours = make_ours(tmp_path, "batched")
    whole = logits_of(ours, make_ids(120))
    layer = ours.expert_layers()[1]
    for expert in range(8):
        weight = layer.experts.down[expert]
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.zero_()
        assert (logits_of(ours, make_ids(120)) - whole).abs().max() > 1e-2
        with torch.no_grad():
            weight.copy_(kept)
    assert_same_logits(ours, theirs)
    layer.router.selection_bias[3] = 1.0
    assert (logits_of(ours, make_ids(120)) - whole).abs().max() > 1e-2


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


@pytest.mark.parametrize("backend", OUR_KERNELS)
def test_text_is_continued_as_theirs_is(tmp_path: Path, backend: str) -> None:
    theirs = save_theirs(tmp_path, "mixtral")
    ours = make_ours(tmp_path, backend)
    ids = make_ids(9)
    wanted = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20, pad_token_id=0
    )
    cache = ours.new_cache(2, 40)
    last = ids
    with torch.no_grad():
        while ids.shape[1] < wanted.shape[1]:  # one token at a time reads the chosen experts only
            last = ours(last, cache=cache, last_only=True).logits.argmax(-1)
            ids = torch.cat([ids, last], 1)
    assert torch.equal(ids, wanted)


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
    values = {name: ours.routing.get(name) for name in ("warmup", "temperature", "jitter")}
    assert values == {"warmup": 1.0, "temperature": 1.0, "jitter": 0.0}
    assert (ours.routing.get("capacity_factor"), ours.routing.get("bias_rate")) == (None, 0.0)
    for layer in ours.expert_layers().values():
        assert layer.router.active.tolist() == [True] * 8
        assert not layer.router.selection_bias.any()
    ours.routing.warm_up(1)
    assert ours.routing.get("warmup") == 1.0, "a trained router is not made uniform first"


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    save_theirs(tmp_path, "mixtral")
    rename(tmp_path, "layers.1.block_sparse_moe.experts.7.w3", "layers.1.gone")
    with pytest.raises(CheckpointError, match=r"no weight model\.layers\.1\.block_sparse_moe\.exp"):
        load_pretrained(f"hf:{tmp_path}")


def test_an_expert_too_much_is_named(tmp_path: Path) -> None:
    save_theirs(tmp_path, "mixtral")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_local_experts": 7}))
    with pytest.raises(CheckpointError, match=r"experts\.7\.w1\.weight, which no model of its"):
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


def test_a_temperature_is_worked_into_the_router(tmp_path: Path) -> None:
    ours, done = export_changed(tmp_path, MOE, {"routing.temperature": 0.3})
    assert "temperature of 0.3" in done.remarks[0]
    assert_same_logits(ours, load_theirs(done.folder))
    plain, _ = load_pretrained(f"hf:{export_changed(tmp_path / 'plain', MOE, {})[1].folder}")
    assert (logits_of(plain, make_ids()) - logits_of(ours, make_ids())).abs().max() > 1e-2


def test_a_warm_up_that_goes_on_is_worked_into_the_router(tmp_path: Path) -> None:
    changes = {"routing.warmup": 0.4, "routing.temperature": 2.0}
    ours, done = export_changed(tmp_path, MOE, changes)
    assert len(done.remarks) == 2
    assert "warmup of 0.4" in done.remarks[1]
    assert_same_logits(ours, load_theirs(done.folder))


def test_empty_slots_are_left_out(tmp_path: Path) -> None:
    moe = {**MOE, "groups": [{**MOE["groups"][0], "max_experts": 9}]}
    ours, done = export_changed(tmp_path, moe, {})
    assert len(ours.blocks[0].feed_forward.experts.down) == 9
    theirs = load_theirs(done.folder)
    assert theirs.config.num_local_experts == 6
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize(
    "moe",
    [
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
    ours, done = export_changed(tmp_path, moe, {})
    assert_same_logits(ours, load_theirs(done.folder))


def refused_run(place: Path, changes: dict[str, Any]) -> tuple[str, RunFolder]:
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        export_changed(place, MOE, changes)
    return str(caught.value), RunFolder(next((place / "runs").iterdir()))


def test_a_bias_that_chooses_experts_is_refused(tmp_path: Path) -> None:
    bias = [0.0, 0.0, 0.0, -0.25, 0.0, 0.0]
    message, run = refused_run(tmp_path, {"blocks.1.feed_forward.router.selection_bias": bias})
    assert "blocks.1.feed_forward.router.selection_bias is up to 0.25" in message
    assert "model.moe.balance.bias_rate=0" in message
    assert str(run.path) in message
    assert not (run.path / "export").exists()


def test_other_experts_than_configured_are_refused(tmp_path: Path) -> None:
    active = [True, True, True, True, False, True]
    message, _ = refused_run(tmp_path, {"blocks.0.feed_forward.router.active": active})
    assert "router.active has 5 experts in other slots than the first 6" in message
