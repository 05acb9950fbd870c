"""What each live control does to the choice of experts, and what it may be set to."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.model.experts.mixtures import FOUR, ONE, make_router, mixture, route, routing_pass
from ultrathink.config.experts import MoeConfig
from ultrathink.config.model import ModelConfig
from ultrathink.core.errors import UltrathinkError
from ultrathink.model.experts.controls import RoutingControls
from ultrathink.model.experts.router import Router
from ultrathink.model.transformer import Transformer

SIX: list[dict[str, Any]] = [
    {"name": "six", "num_experts": 6, "top_k": 2},
    {"name": "three", "num_experts": 3, "top_k": 1, "max_experts": 5},
]
SPANS = ((0, 4), (4, 21), (21, 30))  # documents of a row


def taken(
    router: Router, experts: Tensor, x: Tensor, labels: Tensor, spans: Any, factor: str
) -> Tensor:
    """Whether each choice ``[B, T, K]`` is within capacity, expert by expert."""
    kept = torch.ones_like(experts, dtype=torch.bool)
    for group, slots in router.groups():
        inside = slice(slots.start, slots.start + group.num_experts)
        scores = (x @ router.weight[inside].T).softmax(-1)
        for row in range(len(x)):
            for begin, end in spans:
                counted = [t for t in range(begin, end) if labels[row, t] != -100]
                share = Fraction(max(1, len(counted)) * group.top_k, group.num_experts)
                capacity = math.ceil(Fraction(factor) * share)
                for expert in range(inside.start, inside.stop):
                    here = [t for t in range(begin, end) if expert in experts[row, t]]
                    first = [t for t in here if t in counted]
                    first.sort(key=scores[row, :, expert - inside.start].neg().tolist().__getitem__)
                    rest = [t for t in here if t not in counted]  # the last of these go first
                    for t in (first + rest)[capacity:]:
                        kept[row, t, experts[row, t] == expert] = False
    return kept


@pytest.mark.parametrize("factor", ["0.5", "1", "1.1", "1.25", "40"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("is_packed", [False, True])
def test_what_exceeds_capacity_is_dropped_in_the_order_of_scores(
    is_packed: bool, dtype: torch.dtype, factor: str
) -> None:
    router, controls = make_router(SIX, dtype)
    router.selection_bias[::3] = 1.0  # some have more than their share
    x = torch.randn(4, 30, 8, dtype=dtype)
    labels = torch.zeros(4, 30, dtype=torch.int64)
    labels[1:][torch.rand(3, 30) < 0.3] = -100
    labels[2, 20:] = -100
    ids = torch.cat([torch.full((end - begin,), i) for i, (begin, end) in enumerate(SPANS)])
    options = (labels, ids.expand(4, 30) if is_packed else None)
    all_experts, all_gates, before = route(router, controls, x, *options)
    controls.set("capacity_factor", float(factor))
    experts, gates, after = route(router, controls, x, *options)
    spans = SPANS if is_packed else ((0, 30),)
    kept = taken(router, all_experts, x, labels, spans, factor)
    assert torch.equal(experts, torch.where(kept, all_experts, len(router.weight)))
    assert torch.equal(gates, torch.where(kept, all_gates, 0.0))
    assert kept.all() == (factor == "40")
    # Dropped or not, a choice counts as load; what is dropped is counted beside it.
    assert torch.equal(after.load, before.load)
    assert torch.equal(after.losses, before.losses)
    counted = (labels != -100)[..., None] & ~kept
    for expert, dropped in enumerate(after.dropped.tolist()):
        assert dropped == (counted & (all_experts == expert)).sum()
    router.eval()
    assert torch.equal(route(router, controls, x, *options)[0], all_experts)


def test_a_token_whose_experts_are_all_full_goes_past_the_layer() -> None:
    config = ModelConfig(hidden_size=16, num_heads=2, num_layers=1, vocab_size=9, moe=mixture(ONE))
    model = Transformer(config)
    assert model.routing is not None
    model.routing.set("capacity_factor", 1e-3)  # one token each
    layer = model.expert_layers()[0]
    x = torch.randn(1, 20, 16)
    out, routing = layer(x, routing_pass(model.routing, x))
    assert float(routing.load.sum() - routing.dropped.sum()) <= 4
    assert int(out.any(-1).sum()) <= 4


def test_training_mode_without_gradients_drops_as_well() -> None:
    """As when a batch is only looked at; a few tokens, whose experts are read one by one."""
    config = ModelConfig(hidden_size=16, num_heads=2, num_layers=1, vocab_size=9, moe=mixture(FOUR))
    model = Transformer(config)
    assert model.routing is not None
    model.routing.set("capacity_factor", 0.01)
    tokens = torch.randint(0, 9, (1, 3))
    expected = model(tokens).logits
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, expected)


def test_closed_experts_are_closed_for_a_sequence() -> None:
    """By the given share of sequences, each expert by itself; never so many that none is left."""
    router, controls = make_router([{"name": "a", "num_experts": 5, "top_k": 1}])
    with torch.no_grad():
        router.weight.zero_()
        router.selection_bias.copy_(torch.arange(5.0, 0, -1))  # the first of those that are open
    x = torch.randn(4000, 3, 8, dtype=torch.float64)
    for share in (0.0, 0.3, 0.9):
        controls.set("expert_dropout", share)
        experts, _, _ = route(router, controls, x)
        assert (experts == experts[:, :1]).all()
        for expert in range(5):
            expected = (1 - share) * share**expert
            if expert == 0:
                expected += share**5  # all are closed, so the order is as before
            found = float((experts[:, 0] == expert).double().mean())
            assert found == pytest.approx(expected, abs=0.03)
    router.eval()
    assert not route(router, controls, x)[0].any()


@pytest.mark.parametrize("share", [0.5, 0.99])
def test_however_many_are_closed_a_token_has_its_experts(share: float) -> None:
    router, controls = make_router(SIX, torch.float32, routing={"expert_dropout": share})
    x = torch.randn(200, 4, 8)
    experts, gates, routing = route(router, controls, x)
    assert router.active[experts].all()  # no empty slot instead of a closed expert
    assert (experts[..., 0] != experts[..., 1]).all()
    assert routing.load[:6].sum() == 2 * 800
    assert routing.load[6:].sum() == 800
    assert torch.isfinite(gates).all()


def test_jitter_multiplies_what_the_router_reads() -> None:
    """Of one number per token, so that what it was multiplied by can be inferred from its logit."""
    router, controls = make_router([{"name": "a", "num_experts": 2, "top_k": 1}])
    with torch.no_grad():
        router.weight.zero_()
        router.weight[0, 0] = 1.0
    x = torch.zeros(1, 5000, 8, dtype=torch.float64)
    x[..., 0] = 1.0
    controls.set("jitter", 0.4)

    def read() -> Tensor:
        _, gates, _ = route(router, controls, x)
        return (
            (gates / (1 - gates)).log().flatten().detach()
        )  # the logit of the first, which is chosen

    factors = read()
    assert 0.6 <= float(factors.min()) < 0.61
    assert 1.39 < float(factors.max()) <= 1.4
    assert float(factors.mean()) == pytest.approx(1.0, abs=0.02)
    assert not torch.equal(factors, read())
    router.eval()
    torch.testing.assert_close(read(), torch.ones(5000, dtype=torch.float64))


def test_temperature_divides_the_logits_and_not_the_bias() -> None:
    router, controls = make_router(ONE)
    router.selection_bias[3] = 1.0
    x = torch.randn(2, 50, 8, dtype=torch.float64)
    controls.set("temperature", 4.0)
    experts, _, routing = route(router, controls, x)
    logits = x @ router.weight.T / 4
    torch.testing.assert_close(routing.probability, logits.softmax(-1).sum((0, 1)).detach())
    expected = (logits + router.selection_bias).topk(2).indices
    assert torch.equal(experts.sort().values, expected.sort().values)


WRONG: list[tuple[str, Any, str]] = [
    ("temperature", 0.0, r"temperature must be above 0, not 0\.0\."),
    ("temperature", -1, r"temperature must be above 0, not -1\."),
    ("temperature", None, "temperature must be above 0, not None"),
    ("temperature", math.inf, "temperature must be above 0, not inf"),
    ("jitter", 1.0, r"jitter must be 0 or more and below 1, not 1\.0"),
    ("jitter", -0.1, r"jitter must be 0 or more and below 1, not -0\.1"),
    ("capacity_factor", 0, "capacity_factor must be above 0, not 0"),
    ("capacity_factor", math.nan, "capacity_factor must be above 0, not nan"),
    ("expert_dropout", 1, "expert_dropout must be 0 or more and below 1, not 1"),
    ("load", -1.0, r"load must be 0 or more, not -1\.0"),
    ("bias_rate", "fast", "bias_rate must be 0 or more, not 'fast'"),
    ("z", True, "z must be 0 or more, not True"),
    ("capacity_facor", 1.0, "no routing control 'capacity_facor'. Did you mean 'capacity_factor'"),
    ("warmup", 1.0, "no routing control 'warmup'. Known: bias_rate, capacity_factor"),
    ("", 1.0, "no routing control ''"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_what_a_control_cannot_be_is_named(name: str, value: Any, message: str) -> None:
    controls = RoutingControls(MoeConfig.model_validate(mixture(ONE)))
    before = {key: tensor.clone() for key, tensor in controls.state_dict().items()}
    with pytest.raises(UltrathinkError, match=message):
        controls.set(name, value)
    assert all(torch.equal(value, before[key]) for key, value in controls.state_dict().items())


def test_controls_begin_as_configured_and_are_kept() -> None:
    routing = {"temperature": 1.5, "jitter": 0.25, "warmup_steps": 10}
    config = MoeConfig.model_validate(mixture(ONE, routing=routing))
    controls = RoutingControls(config)
    assert [controls.get(name) for name in ("temperature", "jitter", "warmup")] == [1.5, 0.25, 1.0]
    assert controls.get("capacity_factor") is None
    for name in ("load", "importance", "entropy", "z", "bias_rate"):
        assert controls.get(name) == pytest.approx(getattr(config.balance, name))
    controls.set("capacity_factor", 2.0)
    controls.set("jitter", 0.5)
    shares = []
    for step in (1, 5, 10, 11):
        controls.warm_up(step)
        shares.append(controls.get("warmup"))
    assert shares == pytest.approx([0.1, 0.5, 1.0, 1.0])
    other = RoutingControls(config)
    other.load_state_dict(controls.state_dict())
    assert (other.get("capacity_factor"), other.get("jitter")) == (2.0, 0.5)
    controls.set("capacity_factor", None)
    assert controls.get("capacity_factor") is None
    controls.reset()
    assert controls.get("jitter") == 0.25


def test_controls_stay_precise_and_survive_a_model_that_moves() -> None:
    config = ModelConfig(hidden_size=16, num_heads=2, num_layers=1, vocab_size=9, moe=mixture(ONE))
    model = Transformer(config)
    assert model.routing is not None
    model.routing.set("load", 0.123)
    model.to(torch.bfloat16).double().half()
    assert model.routing.now().load.dtype == torch.float32
    assert model.routing.get("load") == pytest.approx(0.123, rel=1e-6)
    with torch.device("meta"):
        empty = Transformer(config)
    empty.to_empty(device="cpu")
    empty.reset_buffers()
    assert empty.routing is not None
    assert empty.routing.get("load") == pytest.approx(0.3)
    assert empty.expert_layers()[0].router.active.all()
