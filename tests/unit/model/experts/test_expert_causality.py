"""In evaluation no token's experts depend on a later one, and nothing is dropped or drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

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
@torch.no_grad()
def test_a_token_changes_no_logit_before_it(
    model: Transformer, tokens: Tensor, packed: Any, is_packed: bool
) -> None:
    documents, positions, _ = packed
    options = {"document_ids": documents, "positions": positions} if is_packed else {}
    before = model(tokens, **options).logits
    for at in (1, 7, 16, 23, 39):
        changed = tokens.clone()
        changed[:, at] = (changed[:, at] + 1) % 53
        after = model(changed, **options).logits
        torch.testing.assert_close(after[:, :at], before[:, :at], rtol=0, atol=1e-12)
        assert (after[:, at] - before[:, at]).abs().max() > 1e-3


@pytest.mark.parametrize("size", [1, 3])
@torch.no_grad()
def test_token_by_token_with_a_cache_is_the_full_pass(
    model: Transformer, tokens: Tensor, size: int
) -> None:
    """One token's experts are few, and read by themselves; three tokens' are not."""
    expected = model(tokens).logits
    cache = model.new_cache(2, 40)
    parts = [model(part, cache=cache).logits for part in tokens.split(size, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-12, atol=1e-12)


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
    half = labels.clone()
    half[:, ::2] = -100
    rest = labels.clone()
    rest[:, 1::2] = -100
    scored = model(tokens, half).loss + model(tokens, rest).loss
    torch.testing.assert_close(first.loss, scored, rtol=1e-12, atol=0)
