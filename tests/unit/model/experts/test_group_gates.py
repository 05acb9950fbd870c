"""The weights of groups: against a loop, and what leaves them as they are."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.model.conftest import TINY, assert_causal
from tests.unit.model.experts.mixtures import (
    CAPACITY,
    FOUR,
    ONE,
    added,
    assert_same,
    make_router,
    mixture,
    route,
    routing_pass,
    trained,
)
from ultrathink.config.model import ModelConfig
from ultrathink.config.optimizer import MuonConfig
from ultrathink.config.size import sizes
from ultrathink.core.errors import UltrathinkError
from ultrathink.model.compute_path import ComputePath, path_of
from ultrathink.model.experts.group_gates import group_loss
from ultrathink.model.experts.sequences import find_sequences
from ultrathink.model.flops import count_parameters, flops_per_token
from ultrathink.model.transformer import Transformer
from ultrathink.training.objectives.pretrain import loss_function
from ultrathink.training.optimizers import build_optimizers

GATED = mixture(FOUR, group_gates=True, shared_size=24)
NAMES = tuple(group["name"] for group in FOUR)
COLUMNS = [0, 0, 1, 1, 2, 3]  # the group of each of a token's experts


def learned(model: Transformer) -> Transformer:
    """``model`` with gates that differ from token to token."""
    for layer in model.expert_layers().values():
        torch.nn.init.normal_(layer.router.group_gates.weight, 0, 0.5)
    return model


def some_targets(tokens: Tensor) -> Tensor:
    """No group, one, or several of each token ``[B, T, 4]``."""
    belongs = torch.rand(*tokens.shape, 4, generator=torch.Generator().manual_seed(5)) < 0.3
    belongs[:, ::5] = False
    return belongs


@torch.no_grad()
def test_at_the_start_a_model_is_the_one_without(make_model: Any, tokens: Tensor) -> None:
    torch.manual_seed(2)
    plain = make_model(moe=mixture(FOUR, shared_size=24))
    torch.manual_seed(2)
    gated = make_model(moe=GATED)
    assert torch.equal(plain(tokens).logits, gated(tokens).logits)
    own = gated.state_dict().keys() - plain.state_dict().keys()
    assert own == {
        "routing.groups",
        *(f"blocks.{n}.feed_forward.router.group_gates.weight" for n in (0, 1)),
    }
    assert not any("group" in name for name in plain.state_dict())
    assert "expert_group_weight" not in plain(tokens, tokens).stats


@torch.no_grad()
def test_gates_are_multiplied_by_weights_that_are_1_on_average() -> None:
    router, controls = make_router(FOUR, group_gates=True)
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    experts, gates, _ = route(router, controls, x)
    torch.nn.init.normal_(router.group_gates.weight, 0, 0.5)
    labels = torch.zeros(2, 9, dtype=torch.int64)
    labels[0, 3:5] = -100
    experts_, gates_, report = route(router, controls, x, labels)
    assert torch.equal(experts, experts_)
    total = [0.0] * 4
    for row in range(2):
        for t in range(9):
            powers = [math.exp(float(x[row, t] @ w)) for w in router.group_gates.weight]
            weights = [4 * power / sum(powers) for power in powers]
            for k, group in enumerate(COLUMNS):
                expected = float(gates[row, t, k]) * weights[group]
                assert float(gates_[row, t, k]) == pytest.approx(expected, rel=1e-12)
            if labels[row, t] != -100:
                total = [a + b for a, b in zip(total, weights, strict=True)]
    assert report.group_weight.tolist() == pytest.approx(total, rel=1e-12)
    assert sum(total) == pytest.approx(4 * 16)


@torch.no_grad()
@pytest.mark.parametrize("off", NAMES)
def test_a_group_that_is_off_changes_no_other(make_model: Any, tokens: Tensor, off: str) -> None:
    """So that what it costs is what the group contributed."""
    router, controls = make_router(FOUR, group_gates=True)
    torch.nn.init.normal_(router.group_gates.weight, 0, 0.5)
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    _, gates, _ = route(router, controls, x)
    path = ComputePath(groups=tuple(name for name in NAMES if name != off))
    choice, report = router(x, routing_pass(controls, x)._replace(path=path))
    assert report is None
    kept = [k for k, group in enumerate(COLUMNS) if NAMES[group] != off]
    torch.testing.assert_close(choice.gates, gates.flatten(0, 1)[:, kept], rtol=1e-14, atol=0)
    model = learned(make_model(moe=GATED, dtype=torch.float64)).eval()
    silent = ComputePath(group_factors={off: 0.0})
    there, here = (model(tokens, path=each).logits for each in (silent, path))
    torch.testing.assert_close(here, there, rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**31),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(2, 5),
    st.floats(0.1, 30),
)
def test_the_loss_is_that_of_a_loop(seed: int, B: int, T: int, G: int, scale: float) -> None:
    """Whatever the logits, with a gradient that is finite."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(B, T, G, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    targets = torch.rand(B, T, G, generator=generator) < 0.4
    labels = torch.where(torch.rand(B, T, generator=generator) < 0.3, -100, 0)
    loss = group_loss(logits, targets, find_sequences(labels, None, logits, -100))
    expected = 0.0
    for b in range(B):
        for t in range(T):
            own = [g for g in range(G) if targets[b, t, g]]
            if own and labels[b, t] != -100:
                row = logits[b, t].tolist()
                powers = [math.exp(value - max(row[g] for g in own)) for value in row]
                share = sum(powers[g] for g in own) / sum(powers)
                expected += max(0.0, math.log((1 + 2 * len(own) / G) / 3 / share))
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    loss.backward()
    assert bool(torch.isfinite(logits.grad).all())


def test_the_loss_moves_the_gates_alone(make_model: Any, tokens: Tensor) -> None:
    """States are not bent to tell sources apart."""
    model = learned(make_model(moe=GATED))
    output = model(tokens, tokens, group_targets=some_targets(tokens))
    output.aux_losses["moe_groups"].backward()
    moved = {name for name, value in model.named_parameters() if value.grad is not None}
    assert moved == {f"blocks.{n}.feed_forward.router.group_gates.weight" for n in (0, 1)}


def test_a_step_raises_the_gate_of_a_tokens_group(make_model: Any, tokens: Tensor) -> None:
    model = make_model(moe=GATED)
    targets = torch.zeros(2, 40, 4, dtype=torch.bool)
    targets[0, :, 1] = targets[1, :, 3] = True

    def shares() -> Tensor:
        rows = [model(tokens[row : row + 1], group_targets=None) for row in (0, 1)]
        return torch.stack([row.stats["expert_group_weight"].mean(0) / 40 for row in rows])

    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(20):
        optimizer.zero_grad()
        model(tokens, tokens, group_targets=targets).aux_losses["moe_groups"].backward()
        optimizer.step()
    after = shares()
    assert after.argmax(1).tolist() == [1, 3]
    assert after[0, 1] > 1.5 < after[1, 3]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "capacity": {"routing": CAPACITY, "score": "sigmoid", "balance": {"groups": 0.5}},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_how_a_batch_is_cut_packed_or_recomputed_changes_nothing(
    make_model: Any, tokens: Tensor, packed: Any, name: str
) -> None:
    model = learned(make_model(moe={**GATED, **OPTIONS[name]}, dtype=torch.float64))
    targets, labels = some_targets(tokens), tokens.roll(-1, 1)
    labels[0, 30:] = -100
    whole = trained(model, tokens, labels, group_targets=targets)
    assert whole["moe_groups"] > 0
    rows = [
        trained(model, *(each[row : row + 1] for each in (tokens, labels)), group_targets=own)
        for row, own in enumerate(targets.split(1))
    ]
    assert_same(whole, added(rows))
    model.set_activation_checkpointing("full")
    assert_same(whole, trained(model, tokens, labels, group_targets=targets), limit=0)
    model.set_activation_checkpointing("none")
    documents, positions, spans = packed
    together = trained(
        model,
        tokens,
        labels,
        document_ids=documents,
        positions=positions,
        group_targets=targets,
    )
    apart = [
        trained(model, tokens[:, a:b], labels[:, a:b], group_targets=targets[:, a:b])
        for a, b in spans
    ]
    assert_same(together, added(apart))


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_token_changes_no_logit_before_it(
    make_model: Any, tokens: Tensor, packed: Any, is_packed: bool
) -> None:
    model = learned(make_model(moe=GATED, dtype=torch.float64)).eval()
    assert_causal(model, tokens, packed, is_packed)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile itself
def test_the_weight_of_the_loss_is_live_in_a_compiled_step(make_model: Any, tokens: Tensor) -> None:
    model = learned(make_model(moe=GATED, num_layers=1))
    targets, labels = some_targets(tokens), tokens.roll(-1, 1)
    eager = loss_function(model)
    compiled = torch.compile(eager, fullgraph=True, dynamic=False, backend="aot_eager")
    found = []
    for weight in (0.01, 0.04):
        model.routing.set("groups", weight)
        options = {"group_targets": targets}
        with torch._dynamo.config.patch(error_on_recompile=weight == 0.04):
            losses = compiled(tokens, labels, None, None, **options).aux_losses
        here = eager(tokens, labels, None, None, **options).aux_losses["moe_groups"]
        torch.testing.assert_close(losses["moe_groups"], here)
        found.append(float(here.detach()))
    assert found[1] == pytest.approx(4 * found[0])


def test_sizes_and_operations_count_the_gates(make_model: Any) -> None:
    plain, gated = (
        ModelConfig(**TINY | {"num_layers": 8, "moe": {**GATED, "group_gates": is_on}})
        for is_on in (False, True)
    )
    model = make_model(num_layers=8, moe=GATED)
    assert sizes(gated).total == count_parameters(model).total == sizes(plain).total + 8 * 4 * 32
    assert sizes(gated).active == sizes(plain).active + 8 * 4 * 32
    for name, layers in (("deep", 8), ("expert", 5), ("standard", 0)):
        more = flops_per_token(gated, 16, name) - flops_per_token(plain, 16, name)
        assert more == 6 * layers * 4 * 32
    assert path_of("standard", gated).groups == ()


def test_gates_are_moved_as_the_router_is(make_model: Any) -> None:
    model = make_model(moe=GATED)
    [_, adamw] = build_optimizers(MuonConfig(), model)
    by_adamw = {parameter for group in adamw.param_groups for parameter in group["params"]}
    assert model.blocks[0].feed_forward.router.group_gates.weight in by_adamw


def test_what_does_not_fit_is_named(make_model: Any, tokens: Tensor) -> None:
    with pytest.raises(ValueError, match="'experts' is the only one; add a group"):
        ModelConfig(**TINY | {"moe": mixture(ONE, group_gates=True)})
    plain, gated = (make_model(moe=moe) for moe in (mixture(FOUR), GATED))
    targets = some_targets(tokens)
    with pytest.raises(ValueError, match=r"needs a model with group gates \(model\.moe\.group_g"):
        plain(tokens, tokens, group_targets=targets)
    with pytest.raises(ValueError, match=r"has shape \[2, 40, 3\]; it must be \[2, 40, 4\]"):
        gated(tokens, tokens, group_targets=targets[..., :3])
    for ask in (plain.routing.get, lambda name: plain.routing.set(name, 0.5)):
        with pytest.raises(UltrathinkError, match="groups cannot be changed: this model has no"):
            ask("groups")


def test_tokens_that_pass_a_layer_by_are_taught_nothing_there(make_model: Any) -> None:
    """Depth routing takes the targets of the tokens that go through, and of no others."""
    model = make_model(
        num_layers=1, moe=mixture(FOUR, group_gates=True), mod={"layers": "all", "capacity": 0.5}
    )
    model.train()
    tokens = torch.randint(0, 53, (1, 16), generator=torch.Generator().manual_seed(3))
    chosen: list[Tensor] = []
    model.blocks[0].depth.register_forward_hook(lambda *call: chosen.append(call[2].chosen))
    targets = torch.zeros(1, 16, 4, dtype=torch.bool)
    model(tokens, tokens, group_targets=targets)
    targets[..., 0] = True
    whole = model(tokens, tokens, group_targets=targets).aux_losses["moe_groups"]
    targets[..., 0] = chosen[0]
    own = model(tokens, tokens, group_targets=targets).aux_losses["moe_groups"]
    targets[..., 0] = ~chosen[0]
    other = model(tokens, tokens, group_targets=targets).aux_losses["moe_groups"]
    assert whole > 0
    torch.testing.assert_close(own, whole)
    assert other == 0
