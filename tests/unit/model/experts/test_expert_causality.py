"""In evaluation no token's experts depend on a later one, and nothing is dropped or drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.model.conftest import assert_causal
from tests.unit.model.experts.mixtures import CAPACITY, FOUR, mixture
from ultrathink.model.transformer import Transformer

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "capacity": {"routing": {"capacity_factor": 0.3}},
    "noise": {"routing": {"jitter": 0.5, "expert_dropout": 0.5, **CAPACITY}},
    "sigmoid": {"score": "sigmoid", "routing": {"temperature": 0.5, **CAPACITY}},
    "shared": {"shared_size": 16, "normalize_gates": False},
}


@pytest.fixture(params=OPTIONS)
def model(request: pytest.FixtureRequest, make_model: Any) -> Transformer:
    moe = mixture(FOUR, **OPTIONS[request.param])
    model: Transformer = make_model(moe=moe, dtype=torch.float64).eval()
    assert model.routing is not None
    model.routing.warm_up(40)
    for layer in model.expert_layers().values():
        layer.router.selection_bias.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_token_changes_no_logit_before_it(
    model: Transformer, tokens: Tensor, packed: Any, is_packed: bool
) -> None:
    assert_causal(model, tokens, packed, is_packed)


@torch.no_grad()
def test_evaluation_is_the_same_each_time_and_drops_nothing(
    model: Transformer, tokens: Tensor
) -> None:
    """Nor does it depend on what else is in the batch, or on which tokens are scored."""
    labels = tokens.roll(-1, 1)
    first, second = model(tokens, labels), model(tokens, labels)
    assert torch.equal(first.loss, second.loss)
    assert not first.stats["expert_dropped"].any()
    alone = sum(model(tokens[row : row + 1], labels[row : row + 1]).loss for row in range(2))
    torch.testing.assert_close(first.loss, alone, rtol=1e-12, atol=0)
    halves = [labels.masked_fill(torch.arange(40) % 2 == parity, -100) for parity in (0, 1)]
    scored = sum(model(tokens, half).loss for half in halves)
    torch.testing.assert_close(first.loss, scored, rtol=1e-12, atol=0)
