"""A layer of experts against a loop over tokens and experts, in float64, values and gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.model.experts.mixtures import FOUR, ONE, mixture, routing_pass
from ultrathink.config.model import ModelConfig
from ultrathink.model.experts.controls import RoutingControls
from ultrathink.model.experts.layer import MixtureOfExperts
from ultrathink.model.experts.router import LayerRouting
from ultrathink.model.transformer import Transformer

SHAPE: dict[str, Any] = {"hidden_size": 24, "num_heads": 2, "num_layers": 2, "vocab_size": 31}
CASES: dict[str, dict[str, Any]] = {
    "one group": {"groups": ONE},
    "one expert of a token": {"groups": [{"name": "a", "num_experts": 5, "top_k": 1}]},
    "all experts of a token": {"groups": [{"name": "a", "num_experts": 3, "top_k": 3}]},
    "four groups": {"groups": FOUR},
    "gates as they are": {"groups": FOUR, "normalize_gates": False},
    "sigmoid": {"groups": FOUR, "score": "sigmoid"},
    "sigmoid as it is": {"groups": ONE, "score": "sigmoid", "normalize_gates": False},
    "scaled gates": {"groups": FOUR, "gate_scale": 2.5},
    "shared": {"groups": ONE, "shared_size": 40},
    "hot": {"groups": FOUR, "routing": {"temperature": 2.5}},
    "loop": {"groups": FOUR, "backend": "loop"},
}


def build(feed_forward: str = "swiglu", **options: Any) -> tuple[ModelConfig, MixtureOfExperts]:
    """A layer of experts in float64, and its configuration; every weight and bias counts."""
    options = mixture(**options)
    config = ModelConfig(**SHAPE, feed_forward=feed_forward, moe=options)
    torch.manual_seed(0)
    layer = Transformer(config).blocks[1].feed_forward.double()  # type: ignore[union-attr]
    assert isinstance(layer, MixtureOfExperts)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.5)
        layer.router.selection_bias.normal_(0, 0.5)
    return config, layer


def routed(config: ModelConfig, layer: MixtureOfExperts, x: Tensor) -> tuple[Tensor, LayerRouting]:
    assert config.moe is not None
    out, routing = layer(x, routing_pass(RoutingControls(config.moe).double(), x))
    assert routing is not None
    return out, routing


def feed_forward(inner: Tensor, down: Tensor, x: Tensor, is_gated: bool) -> Tensor:
    hidden = inner @ x
    if is_gated:
        gate, up = hidden.chunk(2)
        return down @ (gate / (1 + (-gate).exp()) * up)
    return down @ hidden.clamp(min=0) ** 2


def reference(config: ModelConfig, layer: MixtureOfExperts, x: Tensor) -> Tensor:
    """``[N, C]``: each token by itself, through each of its experts by itself."""
    moe, is_gated, rows = config.moe, config.feed_forward == "swiglu", []
    assert moe is not None
    for token in x.flatten(0, 1):
        logits = layer.router.weight @ token / moe.routing.temperature
        wanted = (logits + layer.router.selection_bias).detach()
        row, first = torch.zeros_like(token), 0
        for group in moe.groups:
            inside = range(first, first + group.num_experts)
            chosen = sorted(inside, key=lambda expert: -float(wanted[expert]))[: group.top_k]
            weights = {i: math.e ** logits[i] for i in inside}
            gates = {i: weights[i] / sum(weights.values()) for i in inside}
            if moe.score == "sigmoid":
                gates = {i: weights[i] / (1 + weights[i]) for i in inside}
            is_normalized = moe.normalize_gates and group.top_k > 1
            total = sum(gates[i] for i in chosen) if is_normalized else 1
            for i in chosen:
                inner, down = layer.experts.inner[i], layer.experts.down[i]
                gate = moe.gate_scale * gates[i] / total
                row = row + gate * feed_forward(inner, down, token, is_gated)
            first += group.num_experts
        if layer.shared is not None:
            weights_ = dict(layer.shared.named_parameters())
            inner = weights_["gate_up.weight" if is_gated else "up.weight"]
            row = row + feed_forward(inner, weights_["down.weight"], token, is_gated)
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["swiglu", "relu2"])
@pytest.mark.parametrize("case", CASES)
def test_layer_equals_a_loop_over_tokens_and_experts(case: str, kind: str) -> None:
    config, layer = build(kind, **CASES[case])
    x = torch.randn(2, 20, 24, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(40, 24, dtype=torch.float64)
    leaves = [x, *layer.parameters()]
    expected = reference(config, layer, x)
    wanted = torch.autograd.grad((expected * direction).sum(), leaves)
    out, _ = routed(config, layer, x)
    found = torch.autograd.grad((out.flatten(0, 1) * direction).sum(), leaves)
    torch.testing.assert_close(out.flatten(0, 1), expected, rtol=1e-10, atol=1e-10)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert all(gradient.any() for gradient in found)  # the gate's too, with one expert of a token


@pytest.mark.parametrize("kind", ["swiglu", "relu2"])
@pytest.mark.parametrize("case", ["four groups", "sigmoid as it is", "shared"])
@torch.no_grad()
def test_a_few_tokens_take_the_way_of_many(case: str, kind: str) -> None:
    """In generation only the weights of the chosen experts are read."""
    config, layer = build(kind, **CASES[case])
    layer.eval()
    x = torch.randn(1, 40, 24, dtype=torch.float64)
    expected, _ = routed(config, layer, x)
    for size in (1, 2):
        parts = [routed(config, layer, part)[0] for part in x.split(size, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-12, atol=1e-12)
    rows = [routed(config, layer, part)[0] for part in x.view(40, 1, 24).split(3)]
    torch.testing.assert_close(torch.cat(rows).view_as(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["batched", "grouped_mm", "loop"])
def test_less_precise_layers_are_near(dtype: torch.dtype, backend: str) -> None:
    config, layer = build(groups=FOUR, backend=backend)
    x = torch.randn(2, 20, 24, dtype=torch.float64)
    with torch.no_grad():
        layer.router.weight.mul_(20)  # no choice is so near that rounding decides it
    expected = reference(config, layer, x.to(dtype).double()).view_as(x)
    out, _ = routed(config, layer.float(), x.to(dtype))
    assert out.dtype == dtype
    limit = 1e-5 if dtype == torch.float32 else 0.02
    assert (out - expected).norm() <= limit * expected.norm()


def test_the_bias_changes_the_choice_and_no_gate() -> None:
    """Raised so far that it is always chosen, an expert counts what its score says."""
    config, layer = build(groups=[{"name": "a", "num_experts": 4, "top_k": 1}])
    x = torch.randn(1, 30, 24, dtype=torch.float64)
    layer.router.selection_bias.zero_()
    layer.router.selection_bias[2] = 100.0
    out, routing = routed(config, layer, x)
    assert routing.load.tolist() == [0, 0, 30, 0]
    gate = (x[0] @ layer.router.weight.T).softmax(-1)[:, 2:3]
    answers = [feed_forward(layer.experts.inner[2], layer.experts.down[2], t, True) for t in x[0]]
    torch.testing.assert_close(out[0], gate * torch.stack(answers))


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", [0, 1, 2, 3, 4, 5]),
        ("interleaved", [1, 3, 5]),
        ("sandwich", [1, 2, 3, 4]),
        ([0, 4], [0, 4]),
        ([0.0, 0.5, 1.0, 3], [0, 3, 5]),
    ],
)
def test_the_named_layers_have_experts(layers: Any, expected: list[int]) -> None:
    model = Transformer(ModelConfig(**SHAPE | {"num_layers": 6, "moe": mixture(layers=layers)}))
    assert list(model.expert_layers()) == expected
    tokens = torch.randint(0, 31, (2, 10))
    output = model(tokens, tokens)
    assert output.stats["expert_load"].shape == (len(expected), 4)
    assert output.stats["expert_load"].sum(1).tolist() == [40] * len(expected)
    (output.loss + sum(output.aux_losses.values())).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
