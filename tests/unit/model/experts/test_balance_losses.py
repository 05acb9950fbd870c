"""The four losses against NumPy, sequence by sequence and group by group, and their gradients."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.unit.model.experts.mixtures import FOUR, ONE, make_router, route, routing_pass
from ultrathink.model.experts.balance import LOSSES
from ultrathink.model.experts.router import Router

EVEN_WEIGHTS = dict.fromkeys(LOSSES, 1.0)
WITH_SLOTS = [{**group, "max_experts": group["num_experts"] + 2} for group in FOUR]
SPANS = ((0, 5), (5, 6), (6, 18))  # documents of a row


def make_biased(groups: Any = FOUR, **options: Any) -> tuple[Any, Any]:
    """A router whose choice is not that of its scores, and all losses count alike."""
    router, controls = make_router(groups, **{"balance": EVEN_WEIGHTS, **options})
    router.selection_bias.normal_(0, 0.3)
    return router, controls


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 18, 8, dtype=torch.float64)


@pytest.fixture
def labels() -> Tensor:
    """Some tokens are not trained on; of one document of the first row none is."""
    labels = torch.randint(0, 9, (3, 18))
    labels[torch.rand(3, 18) < 0.3] = -100
    labels[0, 6:] = -100
    return labels


def reference(logits: np.ndarray, chosen: np.ndarray, top_k: int, score: str) -> np.ndarray:
    """The sums of the four losses over the tokens of one sequence, for one group.

    ``logits`` and ``chosen`` (1 or 0) are ``[T, N]``, of the counted tokens only.
    """
    num_tokens, num_experts = logits.shape
    weights = np.exp(logits)
    p = weights / weights.sum(1, keepdims=True)
    if score == "sigmoid":
        p = weights / (1 + weights)
        p = p / p.sum(1, keepdims=True)
    load = num_experts * (p.mean(0) * chosen.mean(0) / top_k).sum()
    importance = p.sum(0).var() / p.sum(0).mean() ** 2
    spread = -(p * np.log(p)).sum(1) / math.log(num_experts)
    z = np.log(weights.sum(1)) ** 2
    return np.array([num_tokens * load, num_tokens * importance, (1 - spread).sum(), z.sum()])


def expected_losses(
    router: Router, x: Tensor, labels: Tensor, experts: Tensor, spans: Any, score: str
) -> np.ndarray:
    logits = (x @ router.weight.T).detach().numpy()
    total = np.zeros(4)
    for row in range(len(x)):
        for begin, end in spans:
            counted = begin + np.flatnonzero(labels[row, begin:end].numpy() != -100)
            if len(counted) == 0:
                continue
            for group, slots in router.groups():
                of_group = range(slots.start, slots.start + group.num_experts)
                picks = experts[row, counted].numpy()
                chosen = np.stack([(picks == expert).any(1) for expert in of_group], 1)
                assert (chosen.sum(1) == group.top_k).all()
                part = logits[row, counted][:, of_group]
                total += reference(part, chosen.astype(float), group.top_k, score)
    return total


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("groups", [ONE, FOUR, WITH_SLOTS], ids=["one", "four", "empty slots"])
@pytest.mark.parametrize("is_packed", [False, True])
def test_losses_equal_numpy_per_sequence_and_group(
    x: Tensor, labels: Tensor, groups: Any, score: str, is_packed: bool
) -> None:
    router, controls = make_biased(groups, score=score)
    ids = torch.cat([torch.full((end - begin,), i) for i, (begin, end) in enumerate(SPANS)])
    documents = ids.expand(3, 18) if is_packed else None
    experts, _, routing = route(router, controls, x, labels, documents)
    spans = SPANS if is_packed else ((0, 18),)
    expected = expected_losses(router, x, labels, experts, spans, score)
    np.testing.assert_allclose(routing.losses.detach().numpy(), expected, rtol=1e-9)
    # What is reported beside them is of the same tokens.
    counted = labels != -100
    load = torch.stack([(experts == e)[counted].sum() for e in range(len(router.weight))])
    assert torch.equal(routing.load, load.double())
    logits = (x @ router.weight.T)[counted].detach()
    for column, (group, slots) in enumerate(router.groups()):
        part = logits[:, slots.start : slots.start + group.num_experts]
        p = (
            part.softmax(-1)
            if score == "softmax"
            else part.sigmoid() / part.sigmoid().sum(-1, True)
        )
        assert not routing.probability[slots.start + group.num_experts : slots.stop].any()
        reported = routing.probability[slots.start : slots.start + group.num_experts]
        torch.testing.assert_close(reported, p.sum(0))
        torch.testing.assert_close(routing.entropy[column], -(p * p.log()).sum())
        torch.testing.assert_close(routing.confidence[column], p.amax(-1).sum())


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_each_loss_has_its_gradient_at_imbalance(x: Tensor, labels: Tensor, score: str) -> None:
    """That of the weights of all experts, chosen or not, but for tokens that do not count."""
    x, labels = x[1:2, :8], labels[1:2, :8]
    router, controls = make_biased(FOUR[2:], score=score)

    def values(weight: Tensor, inputs: Tensor) -> Tensor:
        options = ({"weight": weight}, (inputs, routing_pass(controls, inputs, labels)))
        result: Tensor = torch.func.functional_call(router, *options)[1].losses
        return result

    leaves = (router.weight, x.requires_grad_())
    assert torch.autograd.gradcheck(values, leaves, atol=1e-6, fast_mode=True)
    counted = labels != -100
    for loss in values(*leaves):
        of_weight, of_x = torch.autograd.grad(loss, leaves, retain_graph=True)
        assert all(row.any() for row in of_weight)
        assert all(token.any() for token in of_x[counted])
        assert not of_x[~counted].any()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("scale", [0.0, 1e-8, 1e4], ids=["even", "nearly even", "one-sided"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_losses_and_gradients_are_finite_at_the_ends(
    x: Tensor, labels: Tensor, scale: float, score: str, dtype: torch.dtype
) -> None:
    router, controls = make_biased(WITH_SLOTS, score=score)
    if dtype == torch.bfloat16:
        router.float()
    with torch.no_grad():
        router.weight.mul_(scale)
    *_, routing = route(router, controls, x.to(dtype), labels)
    assert routing.losses.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    [gradient] = torch.autograd.grad(routing.losses.sum(), [router.weight])
    assert torch.isfinite(routing.losses).all()
    assert torch.isfinite(gradient).all()
    if scale == 0.0:  # perfectly even probabilities, in each group
        num_tokens = int((labels != -100).sum())
        logs = [math.log(group["num_experts"]) for group in FOUR]
        expected = [4 * num_tokens, 0, 0, num_tokens * sum(log**2 for log in logs)]
        assert routing.losses.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-3)


def test_a_sequence_without_trained_tokens_adds_nothing(x: Tensor, labels: Tensor) -> None:
    router, controls = make_biased(FOUR)
    *_, routing = route(router, controls, x, torch.full_like(labels, -100))
    assert not routing.losses.any()
    assert not routing.load.any()
    [gradient] = torch.autograd.grad(routing.losses.sum(), [router.weight])
    assert not gradient.any()


def test_one_expert_alone_is_balanced() -> None:
    router, controls = make_biased([{"name": "a", "num_experts": 1, "top_k": 1}])
    *_, routing = route(router, controls, torch.randn(1, 6, 8, dtype=torch.float64))
    load, importance, entropy, _ = routing.losses.tolist()
    assert (load, importance, entropy) == (6, 0, 0)
