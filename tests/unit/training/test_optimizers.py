import pytest

from ultrathink.config.model import ModelConfig
from ultrathink.config.optimizer import AdamWConfig, MuonConfig
from ultrathink.core.errors import CheckpointError
from ultrathink.model.transformer import Transformer
from ultrathink.training.muon import Muon
from ultrathink.training.optimizers import (
    build_optimizers,
    load_optimizer_state,
)

MODEL = ModelConfig(
    hidden_size=32,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=11,
    intermediate_size=48,
    tie_embeddings=False,
)


@pytest.mark.parametrize("config", [AdamWConfig(), MuonConfig(weight_decay=0.1)])
def test_every_parameter_is_moved_by_exactly_one_optimizer(
    config: AdamWConfig | MuonConfig,
) -> None:
    model = Transformer(MODEL)
    moved = [
        (parameter, group["weight_decay"])
        for optimizer in build_optimizers(config, model)
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    parameters = {parameter for parameter, _ in moved}
    assert len(moved) == len(parameters) == len(list(model.parameters()))
    # Matrices are decayed, norms and biases are not.
    assert all((decay > 0) == (parameter.ndim > 1) for parameter, decay in moved)


def test_muon_takes_hidden_matrices_and_knows_what_is_fused_in_them() -> None:
    model = Transformer(MODEL)
    muon, adamw = build_optimizers(MuonConfig(adamw_lr=0.007), model)
    assert isinstance(muon, Muon)
    names = {parameter: name for name, parameter in model.named_parameters()}
    [group] = muon.param_groups
    splits = {names[p]: tuple(muon.row_splits[p]) for p in group["params"]}
    assert splits == {
        "blocks.0.attention.qkv.weight": (32, 16, 16),
        "blocks.0.attention.output.weight": (32,),
        "blocks.0.feed_forward.gate_up.weight": (48, 48),
        "blocks.0.feed_forward.down.weight": (32,),
    }
    assert {group["peak_lr"] for group in adamw.param_groups} == {0.007}


def test_state_of_an_unknown_parameter_is_named() -> None:
    model = Transformer(MODEL)
    optimizers, parameters = build_optimizers(AdamWConfig(), model), dict(model.named_parameters())
    with pytest.raises(CheckpointError, match=r"state for 'blocks\.9', which this model lacks"):
        load_optimizer_state(optimizers, parameters, {"blocks.9": {}})


@pytest.mark.parametrize("moved_by", ["muon", "adamw"])
def test_experts_are_moved_as_configured_and_routers_by_adamw(moved_by: str) -> None:
    group = {"name": "experts", "num_experts": 4, "top_k": 2}
    model = Transformer(
        ModelConfig(
            hidden_size=16,
            num_layers=1,
            num_heads=2,
            vocab_size=16,
            moe={"groups": [group], "intermediate_size": 8},
        )
    )
    muon, adamw = build_optimizers(MuonConfig(experts=moved_by), model)
    by_muon = {p for g in muon.param_groups for p in g["params"]}
    by_adamw = {p for g in adamw.param_groups for p in g["params"]}
    experts = dict(model.named_parameters(prefix=""))
    for name in ("gate_up", "down"):
        weight = experts[f"blocks.0.feed_forward.experts.{name}"]
        assert (weight in by_muon, weight in by_adamw) == (moved_by == "muon", moved_by == "adamw")
    assert experts["blocks.0.feed_forward.router.weight"] in by_adamw
    assert muon.row_splits[experts["blocks.0.feed_forward.experts.gate_up"]] == (8, 8)
