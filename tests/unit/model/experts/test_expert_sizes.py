"""How many weights a model has, how many a token meets, and how they start."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.model.conftest import TINY
from tests.unit.model.experts.mixtures import FOUR, ONE, mixture
from ultrathink.config.model import ModelConfig
from ultrathink.config.size import sizes
from ultrathink.model.flops import count_parameters, flops_per_token
from ultrathink.model.transformer import Transformer

SLOTS = [{**FOUR[0], "max_experts": 9}, FOUR[3]]
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "dense, own head": {"tie_embeddings": False, "qk_norm": True},
    "dense, relu2": {"feed_forward": "relu2", "num_kv_heads": 1, "head_dim": 6},
    "dense, biases": {"qkv_bias": True},
    "one group": {"moe": mixture(ONE)},
    "four groups": {"moe": mixture(FOUR, shared_size=24), "tie_embeddings": False},
    "relu2": {"moe": mixture(FOUR, shared_size=24), "feed_forward": "relu2", "qk_norm": True},
    "empty slots": {"moe": mixture(SLOTS, layers=[1])},
    "width by itself": {"moe": mixture(ONE, intermediate_size=None), "num_layers": 3},
}


def met(model: Transformer) -> int:
    """Weights that one token meets: of experts those with a gradient, of all others every one."""
    model.double().eval()
    token = torch.zeros(1, 1, dtype=torch.int64)
    output = model(token, token)
    output.loss.backward()
    total = 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        if ".experts." in name:
            total += sum(
                part.numel() for part, g in zip(parameter, parameter.grad, strict=True) if g.any()
            )
        else:
            total += parameter.numel()
    return total


@pytest.mark.parametrize("variant", VARIANTS)
def test_counts_equal_the_weights_that_a_token_meets(make_model: Any, variant: str) -> None:
    model = make_model(**VARIANTS[variant])
    total = sum(parameter.numel() for parameter in model.parameters())
    assert sizes(model.config) == (total, met(model))
    assert sizes(ModelConfig.model_validate(TINY | VARIANTS[variant])).total == total
    counts = count_parameters(model)
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    lookups = 0 if model.head is None else model.embedding.weight.numel()
    assert counts.total == total
    assert counts.matrices == met(model) - vectors - lookups
    config = model.config
    seq_len = 10
    keys = sum(query + 1 for query in range(seq_len)) / seq_len  # that a query meets on average
    attention = 3 * config.num_layers * 2 * 2 * keys * config.num_heads * config.head_dim
    assert flops_per_token(config, seq_len) == pytest.approx(6 * counts.matrices + attention)


def deviations(config: ModelConfig) -> dict[str, float]:
    """Of the matrices, each cut at 3 and about 0; norms are ones, and no two layers are equal."""
    model = Transformer(config)
    vectors = [p for p in model.parameters() if p.dim() == 1]
    assert all(torch.all(vector == 1) for vector in vectors)
    first, second = (block.attention.qkv.weight for block in model.blocks[:2])
    assert not torch.equal(first, second)
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            deviation = float(parameter.detach().std())
            assert parameter.abs().max() <= 3.3 * deviation
            assert abs(float(parameter.detach().mean())) <= 0.1 * deviation
            found[name] = deviation
    return found


@pytest.mark.parametrize("kind", ["swiglu", "relu2"])
@pytest.mark.parametrize("has_experts", [False, True])
def test_what_writes_to_the_residual_stream_starts_smaller(kind: str, has_experts: bool) -> None:
    moe = mixture([{"name": "a", "num_experts": 8, "top_k": 2}], shared_size=64)
    config = ModelConfig(
        hidden_size=128,
        num_layers=8,
        num_heads=4,
        vocab_size=300,
        feed_forward=kind,
        tie_embeddings=False,
        qk_norm=True,
        moe={**moe, "intermediate_size": 64} if has_experts else None,
    )
    found = deviations(config)
    cut = 0.02 * 0.986578  # a normal without what lies beyond 3 deviations
    residual = (
        "attention.output.weight",
        "feed_forward.down.weight",
        "experts.down",
        "shared.down.weight",
    )
    for name, deviation in found.items():
        expected = cut / math.sqrt(2 * 8) if name.endswith(residual) else cut
        assert deviation == pytest.approx(expected, rel=0.07), name
    assert sum(name.endswith(residual) for name in found) == (3 if has_experts else 2) * 8
    zero = config.model_copy(update={"init": config.init.model_copy(update={"residual": "zero"})})
    assert {n for n, d in deviations(zero).items() if d == 0} == {
        name for name in found if name.endswith(residual)
    }


def test_experts_start_different_and_empty_slots_at_zero(make_model: Any) -> None:
    model = make_model(moe=mixture(SLOTS))
    expected = [True] * 7 + [False] * 2 + [True] * 3
    for layer in model.expert_layers().values():
        assert layer.router.active.tolist() == expected
        for weight in (layer.router.weight, *layer.experts.parameters()):
            assert [bool(part.any()) for part in weight] == expected
            rows = {tuple(part.flatten().tolist()) for part in weight[layer.router.active]}
            assert len(rows) == 10


def test_an_empty_slot_is_never_chosen_whatever_its_bias(make_model: Any, tokens: Tensor) -> None:
    model = make_model(moe=mixture(SLOTS))
    empty = torch.tensor([False] * 7 + [True] * 2 + [False] * 3)
    for layer in model.expert_layers().values():
        layer.router.selection_bias[empty] = 1e3
    for is_training in (True, False):
        model.train(is_training)
        output = model(tokens, tokens)
        for name in ("expert_load", "expert_probability"):
            assert not output.stats[name][:, empty].any()
        total = output.stats["expert_probability"]
        torch.testing.assert_close(total.sum(1), torch.full((2,), 2.0 * tokens.numel()))
    without = make_model(moe=mixture([FOUR[0], FOUR[3]]), dtype=torch.float64)
    with_slots = make_model(moe=mixture(SLOTS), dtype=torch.float64)
    state = without.state_dict()
    padded = dict(with_slots.state_dict())
    for name, value in state.items():
        if padded[name].shape == value.shape:
            padded[name] = value
        elif not name.endswith(".branch"):  # no expert is split
            padded[name][~empty] = value
    with_slots.load_state_dict(padded)
    one, other = without(tokens, tokens), with_slots(tokens, tokens)
    torch.testing.assert_close(other.loss, one.loss)
    torch.testing.assert_close(other.aux_losses, one.aux_losses)
    torch.testing.assert_close(other.stats["expert_load"][:, ~empty], one.stats["expert_load"])
