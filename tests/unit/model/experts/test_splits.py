"""Split experts: the tree of their parts, and a layer that computes the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters

from tests.unit.model.experts.mixtures import mixture
from tests.unit.model.experts.test_compiled_experts import differing, step
from ultrathink.model.experts.splits import leave, parts_of, release, shares, siblings, split
from ultrathink.model.transformer import Transformer
from ultrathink.training.objectives.pretrain import loss_function

GROUPS = [
    {"name": "a", "num_experts": 5, "top_k": 2, "max_experts": 9},
    {"name": "b", "num_experts": 3, "top_k": 1, "max_experts": 4},
]
PAIRS = ((0, 5), (0, 6), (5, 7), (1, 8), (9, 12))  # also parts of parts, and a group of top-1
WAYS: tuple[dict[str, Any], ...] = ({}, {"score": "sigmoid"}, {"normalize_gates": False})


@torch.no_grad()
def split_all(model: Transformer) -> None:
    generator = torch.Generator().manual_seed(0)
    for layer in model.expert_layers().values():
        router = layer.router
        for kept, new in PAIRS:
            for weight in (router.weight, layer.experts.inner, layer.experts.down):
                weight[new] = weight[kept]
            router.selection_bias[new] = router.selection_bias[kept]
            router.active[new] = True
            slots = slice(0, 9) if new < 9 else slice(9, 13)
            plane = torch.randn(router.side.shape[1], generator=generator).to(router.side)
            split(router.side, router.branch, slots, (kept, new), plane)
    model.note_splits()


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_split_model_has_the_same_outputs_and_its_parts_the_same_gradients(
    make_model: Any, batch: tuple[Tensor, Tensor], way: dict[str, Any]
) -> None:
    balance = dict.fromkeys(("load", "importance", "entropy", "z"), 0.0)
    model = make_model(moe=mixture(GROUPS, **way) | {"balance": balance}, dtype=torch.float64)
    for layer in model.expert_layers().values():
        torch.nn.init.normal_(layer.router.selection_bias, 0, 0.5)
    before, logits = step(loss_function(model), model, batch), model.eval()(batch[0]).logits
    split_all(model.train())
    after = step(loss_function(model), model, batch)
    torch.testing.assert_close(after["loss"], before["loss"], rtol=1e-13, atol=0)
    torch.testing.assert_close(model.eval()(batch[0]).logits, logits, rtol=0, atol=1e-13)
    for name in ("expert_load", "expert_probability"):
        assert (after[name][:, [5, 6, 7, 8, 12]] > 0).all()
    for name, grad in before.items():
        if ".router." not in name and ".experts." not in name and not name.startswith("expert_"):
            continue
        summed = after[name].transpose(0, 1) if name.startswith("expert_") else after[name]
        grad = grad.transpose(0, 1) if name.startswith("expert_") else grad
        if len(summed) != 13:  # of groups, not of experts
            continue
        for kept, new in reversed(PAIRS):
            summed[kept] += summed[new]
            summed[new] = 0
        torch.testing.assert_close(summed, grad, rtol=1e-11, atol=1e-13, msg=name)


def output_of(model: Transformer) -> Tensor:
    """The output of the first layer of experts."""
    seen: list[Tensor] = []
    layer = model.expert_layers()[0]
    hook = layer.register_forward_hook(lambda _, __, out: seen.append(out[0]))
    with torch.no_grad():
        model.eval()(torch.randint(0, 53, (20, 64), generator=torch.Generator().manual_seed(1)))
    hook.remove()
    return seen[0]


def test_splits_move_a_layer_by_rounding_alone(make_model: Any) -> None:
    """A copy that competes instead displaces others."""
    model = make_model(moe=mixture(GROUPS))
    before = output_of(model)
    split_all(model)
    assert (output_of(model) - before).norm() <= 2e-7 * before.norm()
    router = model.expert_layers()[0].router
    release(router.side, router.branch, slice(0, 13))
    assert (output_of(model) - before).norm() > 0.05 * before.norm()


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile uses deprecated parts
def test_a_compiled_step_has_two_graphs_at_most(
    make_model: Any, batch: tuple[Tensor, Tensor]
) -> None:
    model = make_model(moe=mixture(GROUPS), num_layers=2)
    losses = torch.compile(loss_function(model), fullgraph=True, backend="aot_eager")
    counters.clear()
    plain = step(losses, model, batch)
    split_all(model)
    after = step(losses, model, batch)
    assert differing(after, step(loss_function(model), model, batch), 1e-5) == []
    assert counters["stats"]["unique_graphs"] == 2
    first, second = (one.router for one in model.expert_layers().values())
    leave(first.side, first.branch, 7)
    release(second.side, second.branch, slice(0, 9))
    model.note_splits()
    step(losses, model, batch)
    assert counters["stats"]["unique_graphs"] == 2
    assert (plain["loss"] - after["loss"]).abs() < 1e-4 * plain["loss"]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["split", "leave"]), st.integers(0, 99)), max_size=25))
def test_each_token_has_exactly_one_part_of_each_expert(moves: list[tuple[str, int]]) -> None:
    """And a part that leaves gives its tokens to its siblings, and changes no one else's."""
    E, slots = 9, slice(1, 8)
    side, branch = torch.zeros(E, 5), torch.zeros(E, E, dtype=torch.int8)
    active = torch.tensor([True] * 4 + [False] * 4 + [True])
    x = torch.randn(1, 300, 4, generator=torch.Generator().manual_seed(1))
    owner = {slot: slot for slot in range(E)}  # the whole expert that a part was once of
    for number, (move, draw) in enumerate(moves):
        inside = active[slots].nonzero()[:, 0] + 1
        free = (~active[slots]).nonzero()[:, 0] + 1
        was = parts_of(x, side, branch)[0] & active
        chosen = int(inside[draw % len(inside)])
        if move == "split" and len(free):
            new = int(free[draw % len(free)])
            plane = torch.randn(5, generator=torch.Generator().manual_seed(number))
            split(side, branch, slots, (chosen, new), plane)
            active[new], owner[new] = True, owner[chosen]
            now = parts_of(x, side, branch)[0] & active
            assert torch.equal(now[..., chosen] ^ now[..., new], was[..., chosen])
            changed = [chosen, new]
        elif move == "leave" and (heirs := siblings(branch, chosen)):
            leave(side, branch, chosen)
            active[chosen] = False
            now = parts_of(x, side, branch)[0] & active
            gained = now[..., heirs].sum(-1) - was[..., heirs].sum(-1)
            assert torch.equal(gained, was[..., chosen].long())
            changed = [chosen, *heirs]
        else:
            continue
        rest = [slot for slot in range(E) if slot not in changed]
        assert torch.equal(now[..., rest], was[..., rest])
        for whole in {owner[slot] for slot in range(E) if active[slot]}:
            parts = [slot for slot in range(E) if active[slot] and owner[slot] == whole]
            assert bool((now[..., parts].sum(-1) == 1).all())
            assert float(shares(branch)[parts].sum()) == 1
        assert torch.equal(side.any(1), (branch != 0).any(0))
        assert bool((branch[0] == 0).all() and (branch[8] == 0).all())
