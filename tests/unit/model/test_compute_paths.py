"""Paths through a model: what runs on each, what it costs, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.unit.model.conftest import TINY
from tests.unit.model.experts.mixtures import FOUR, ONE, mixture
from ultrathink.config.model import ModelConfig
from ultrathink.config.paths import named_paths
from ultrathink.core.errors import ConfigError
from ultrathink.model.compute_path import ComputePath, path_of
from ultrathink.model.flops import flops_per_token
from ultrathink.model.transformer import Transformer

NAMES = ("fast", "standard", "expert", "deep", "ultra_deep")
SHARED = mixture(FOUR, shared_size=24)


def elastic(make_model: Any, **changes: Any) -> Transformer:
    model: Transformer = make_model(**{"num_layers": 8, "moe": SHARED, **changes}).double().eval()
    with torch.no_grad():
        for layer in model.expert_layers().values():
            layer.router.selection_bias.normal_(0, 0.1)
    return model


@pytest.mark.parametrize(
    ("num_layers", "counts"), [(8, (2, 5)), (6, (2, 4)), (4, (1, 3)), (1, (1, 1)), (12, (3, 8))]
)
def test_five_paths_are_derived(num_layers: int, counts: tuple[int, int]) -> None:
    config = ModelConfig(**TINY | {"num_layers": num_layers, "moe": SHARED})
    fast, standard, expert, deep, ultra = (path_of(name, config) for name in NAMES)
    every = tuple(range(num_layers))
    names = tuple(group["name"] for group in FOUR)
    assert (fast.layers, fast.groups) == (every[: counts[0]], ())
    assert (standard.layers, standard.groups) == (every[: counts[1]], ())
    assert (expert.layers, expert.groups, expert.top_k) == (every[: counts[1]], names, 1)
    assert deep == path_of(None, config) == path_of("DEEP", config)
    assert (ultra.layers, ultra.groups, ultra.top_k) == (every, names, 2)


def test_a_model_without_shared_experts_keeps_its_groups_on_every_path() -> None:
    config = ModelConfig(**TINY | {"moe": mixture(ONE)})
    assert {path_of(name, config).groups for name in NAMES} == {("experts",)}
    dense = ModelConfig(**TINY)
    assert {path_of(name, dense).groups for name in NAMES} == {()}


def test_a_configured_path_replaces_the_derived_one_and_names_others() -> None:
    paths = [{"name": "fast", "layers": 3}, {"name": "half", "layers": [0, 0.5], "top_k": 0.5}]
    config = ModelConfig(**TINY | {"num_layers": 8, "moe": SHARED, "paths": paths})
    assert set(named_paths(config.paths, config.moe)) == {*NAMES, "half"}
    assert path_of("fast", config).layers == (0, 1, 2)
    assert path_of("half", config) == ComputePath((0, 4), None, 0.5).resolved(config)


@torch.no_grad()
def test_a_path_equals_a_model_of_its_own_shape(make_model: Any, tokens: Tensor) -> None:
    """Groups that are off are as if their experts gave nothing, and further layers not there."""
    model = elastic(make_model)
    found = {name: model(tokens, path=name).logits for name in NAMES}
    factors = dict.fromkeys((group["name"] for group in FOUR), 0.0)
    silent = ComputePath(group_factors=factors)
    for name, layers in (("standard", 5), ("fast", 2)):
        del model.blocks[layers:]
        model.config = model.config.model_copy(update={"num_layers": layers})
        assert torch.allclose(model(tokens, path=silent).logits, found[name], atol=1e-12, rtol=0)
        if name == "standard":
            assert torch.equal(model(tokens).logits, found["expert"])


@torch.no_grad()
def test_some_groups_equal_the_others_at_factor_zero(make_model: Any, tokens: Tensor) -> None:
    model = elastic(make_model, num_layers=2)
    for on in (("skill",), ("knowledge", "meta"), ("meta", "safety"), ("safety", "knowledge")):
        off = {group["name"]: 0.0 for group in FOUR if group["name"] not in on}
        expected = model(tokens, path=ComputePath(group_factors=off)).logits
        found = model(tokens, path=ComputePath(groups=on)).logits
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
        one = torch.cat([model(tokens[:, :1], path=ComputePath(groups=on)).logits])  # few tokens
        torch.testing.assert_close(one, expected[:, :1], atol=1e-12, rtol=0)


@torch.no_grad()
def test_factors_of_each_row_are_live(make_model: Any, tokens: Tensor) -> None:
    model = elastic(make_model, num_layers=2)
    factor = torch.tensor([1.0, 0.0], dtype=torch.float64)
    found = model(tokens, path=ComputePath(group_factors={"skill": factor})).logits
    torch.testing.assert_close(found[:1], model(tokens[:1]).logits)
    off = ComputePath(group_factors={"skill": 0.0})
    torch.testing.assert_close(found[1:], model(tokens[1:], path=off).logits)


@torch.no_grad()
def test_more_experts_follow_the_configured_normalization(make_model: Any, tokens: Tensor) -> None:
    """A single expert keeps its gate when a second one joins: it does not jump from p to 1."""
    groups = [
        {"name": "a", "num_experts": 5, "top_k": 1},
        {"name": "b", "num_experts": 4, "top_k": 2},
    ]
    model = elastic(make_model, num_layers=1, moe=mixture(groups, shared_size=16))
    router = model.blocks[0].feed_forward.router
    seen = {}
    kept = router._choose

    def watched(wanted: Tensor, scores: Tensor, group: Any, active: Tensor) -> Any:
        chosen, gate, mask = kept(wanted, scores, group, active)
        seen[group.config.name] = (chosen, gate, scores)
        return chosen, gate, mask

    router._choose = watched
    gates = {}
    for top_k in (0.5, 1.0, 2.0, 9.0):
        model(tokens, path=ComputePath(top_k=top_k))
        gates[top_k] = dict(seen)
    for top_k, width in ((0.5, 1), (1.0, 1), (2.0, 2), (9.0, 5)):  # all of group a at the most
        chosen, gate, scores = gates[top_k]["a"]
        assert gate.shape[-1] == width
        torch.testing.assert_close(gate, scores.gather(-1, chosen))
    for top_k, width in ((1.0, 2), (2.0, 4), (9.0, 4)):
        gate = gates[top_k]["b"][1]
        assert gate.shape[-1] == width
        torch.testing.assert_close(gate.sum(-1), torch.ones_like(gate[..., 0]))
    # One of two keeps its share, and with it a gradient for the router.
    torch.testing.assert_close(gates[0.5]["b"][1], gates[1.0]["b"][1][..., :1])


@torch.no_grad()
def test_no_path_uses_more_experts_than_are_active(make_model: Any, tokens: Tensor) -> None:
    groups = [{"name": "a", "num_experts": 3, "top_k": 2, "max_experts": 6}]
    model = elastic(make_model, num_layers=2, moe=mixture(groups, shared_size=16))
    every = model(tokens, path=ComputePath(top_k=1.5)).logits
    for top_k in (2.0, 7.0):
        found = model(tokens, path=ComputePath(top_k=top_k)).logits
        torch.testing.assert_close(found, every, atol=1e-12, rtol=0)


def test_a_narrow_path_leaves_the_router_a_gradient(make_model: Any, tokens: Tensor) -> None:
    """minimind 858, megablocks 87: top-1 gates that are normalized to 1 have none."""
    model = elastic(make_model, num_layers=1, moe=mixture(ONE, shared_size=16))
    model(tokens, tokens, path=ComputePath(top_k=0.5)).loss.backward()
    assert model.blocks[0].feed_forward.router.weight.grad.abs().max() > 1e-4


def test_routing_is_reported_of_the_model_as_it_is_trained(make_model: Any, tokens: Tensor) -> None:
    model = elastic(make_model)
    assert model(tokens, tokens, path="expert").stats["expert_load"].shape == (5, 21)
    for name in ("fast", "standard", "ultra_deep"):
        output = model(tokens, tokens, path=name)
        assert output.aux_losses == {}
        assert "expert_load" not in output.stats


@pytest.mark.parametrize(
    ("name", "layers"), [*((name, "all") for name in NAMES), ("standard", "interleaved")]
)
def test_operations_are_those_of_a_counted_step(make_model: Any, name: str, layers: str) -> None:
    """One token a row: the counter takes attention for the full square, which is then the same."""
    moe = {**SHARED, "layers": layers, "backend": "loop"}
    wide = {"hidden_size": 128, "intermediate_size": 256, "num_layers": 8}
    model = make_model(**wide, moe={**moe, "intermediate_size": 64})

    def product(rows: Any, weights: Any, ends: Any, *_: Any, out_shape: Any = None) -> int:
        return 2 * rows[0] * weights[1] * weights[2]

    def outer(grad: Any, rows: Any, ends: Any, *_: Any, out_shape: Any = None) -> int:
        return 2 * grad[0] * grad[1] * rows[1]

    ops = torch.ops.ultrathink
    counter = FlopCounterMode(
        display=False, custom_mapping={ops.grouped_product: product, ops.grouped_outer: outer}
    )
    ids = torch.zeros(256, 1, dtype=torch.int64)
    model.train()
    with counter:
        model(ids, ids, path=name).loss.backward()
    counted = counter.get_total_flops() / 256
    assert flops_per_token(model.config, 1, name) == pytest.approx(counted, rel=0.01)


def test_which_path_begins_another() -> None:
    config = ModelConfig(
        **TINY | {"num_layers": 8, "moe": {**SHARED, "layers": [2, 3, 4, 5, 6, 7]}}
    )
    paths = {name: path_of(name, config) for name in NAMES}
    begins = {(a, b) for a in NAMES for b in NAMES if paths[a].is_prefix_of(paths[b], config)}
    # The first two layers are dense here, so fast begins them all.
    assert begins == {
        *((name, name) for name in NAMES),
        *(("fast", name) for name in NAMES),
        ("expert", "deep"),
    }


REFUSED: dict[str, tuple[Any, str]] = {
    "a name": ("fastest", "there is no compute path 'fastest'. Did you mean 'fast'"),
    "another name": ("x", "Known: deep, expert, fast, standard, ultra_deep"),
    "a layer": (ComputePath((0, 9)), "there is no layer 9; the model has 8, 0 to 7"),
    "a group": (ComputePath(groups=("skil",)), "no expert group 'skil'. Did you mean 'skill'"),
    "a factor": (ComputePath(group_factors={"x": 1.0}), "group_factors: there is no expert group"),
    "no experts": (ComputePath(top_k=0), "top_k must be above 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_path_that_is_not_there_is_named(make_model: Any, tokens: Tensor, name: str) -> None:
    path, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        elastic(make_model)(tokens, path=path)


def test_groups_are_not_left_out_where_nothing_else_computes(
    make_model: Any, tokens: Tensor
) -> None:
    model = make_model(moe=mixture(ONE, layers=[1]))
    with pytest.raises(ConfigError, match="without expert groups layer 1 would compute nothing"):
        model(tokens, path=ComputePath(groups=()))
    model(tokens, path=ComputePath(layers=(0,), groups=()))


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "a layer": ({"layers": 9}, "layers of path 'p': 9 are more than the model has, 2"),
    "a share": ({"layers": 1.5}, "must be above 0, up to 1"),
    "none": ({"layers": []}, "layers is empty"),
    "an index": ({"layers": [0, 7]}, "there is no layer 7"),
    "a truth value": ({"layers": [True]}, "True is no layer; write an index"),
    "a group": ({"groups": ["x"]}, "groups of path 'p': there is no expert group 'x'"),
    "nothing": ({"groups": []}, "without expert groups layer 0 would compute nothing"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configured_path_that_does_not_fit_is_named(name: str) -> None:
    values, message = CONFIGS[name]
    with pytest.raises(ValueError, match=message):
        ModelConfig(**TINY | {"moe": mixture(ONE), "paths": [{"name": "p", **values}]})


def test_two_paths_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two paths are called 'p'"):
        ModelConfig(**TINY | {"paths": [{"name": "p"}, {"name": "p", "layers": 1}]})
