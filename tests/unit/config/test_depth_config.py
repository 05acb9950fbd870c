"""The section ``model.mod``: layers, capacities in eighths, schedules, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.model.conftest import TINY
from ultrathink.config.model import ModelConfig
from ultrathink.core.errors import ConfigError
from ultrathink.model.compute_path import ComputePath, path_of


def configured(num_layers: int = 4, **mod: Any) -> ModelConfig:
    return ModelConfig.model_validate(TINY | {"num_layers": num_layers, "mod": mod})


@pytest.mark.parametrize(
    ("layers", "found"),
    [("all", (0, 1, 2, 3)), ("interleaved", (1, 3)), ((0, 0.5, 1.0), (0, 2, 3))],
)
def test_layers_are_named(layers: Any, found: tuple[int, ...]) -> None:
    assert configured(layers=layers).depth_layers == found
    assert ModelConfig(**TINY).depth_layers == ()


@pytest.mark.parametrize(
    ("capacity", "eighths"),
    [(0.7, 6), (0.45, 4), (0.5, 4), (0.01, 1), (0.125, 1), (0.9, 7), (0.95, 8), (1.0, 8)],
)
def test_capacities_are_rounded_to_eighths_and_that_is_said(capacity: float, eighths: int) -> None:
    mod = configured(capacity=capacity).mod
    assert mod is not None
    assert mod.eighths == eighths
    said = mod.rounded()
    if capacity == eighths / 8:
        assert said == []
    else:
        assert len(said) == 1
        assert f"model.mod.capacity = {capacity:g} is rounded to {eighths / 8:g}" in said[0]


def test_a_schedule_shares_the_run_and_ends_with_the_capacity() -> None:
    mod = configured(schedule=[0.75, 0.5, 0.45]).mod
    assert mod is not None
    assert mod.capacity == 0.45
    assert [mod.eighths_at(step, 9) for step in range(1, 12)] == [6] * 3 + [4] * 8
    assert len(mod.rounded()) == 2  # the capacity, and its place in the schedule
    mod = configured(schedule=[1.0, 0.25], capacity=0.26).mod
    assert mod is not None
    assert [mod.eighths_at(step, 4) for step in (1, 2, 3, 4)] == [8, 8, 2, 2]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "zero": ({"capacity": 0}, "capacity\n  Input should be greater than 0"),
    "more than all": ({"capacity": 1.2}, "capacity\n  Input should be less than or equal to 1"),
    "a stage": ({"schedule": [2.0, 0.5]}, "schedule has the capacity 2.0; use shares above 0"),
    "two ends": ({"schedule": [0.5], "capacity": 1}, "schedule ends with 0.5, and capacity is 1"),
    "a layer": ({"layers": [7]}, "there is no layer 7; the model has 4, 0 to 3"),
    "a truth value": ({"layers": [True]}, "True is no layer"),
    "no layer": ({"layers": []}, "no layer of a model with num_layers = 4"),
    "a scope": ({"scope": "attention"}, "Input should be 'feed_forward' or 'block'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_named(name: str) -> None:
    values, message = REFUSED[name]
    with pytest.raises(ValueError, match="mod") as caught:
        configured(**values)
    assert message in str(caught.value)


def test_a_path_has_a_capacity_of_its_own() -> None:
    paths = [{"name": "half", "depth": 0.3}]
    config = ModelConfig.model_validate(TINY | {"mod": {"layers": [1]}, "paths": paths})
    half = path_of("half", config)
    assert half.depth == 0.25
    assert path_of("deep", config).depth is None
    assert not half.is_prefix_of(path_of(None, config), config)
    first = ComputePath((0,))  # nothing is passed by there
    assert first.is_prefix_of(half, config)
    assert first.is_prefix_of(path_of(None, config), config)


@pytest.mark.parametrize(
    ("mod", "depth", "message"),
    [
        (None, 0.5, "ComputePath.depth: the model has no depth routing; model.mod gives it some"),
        ({}, 0.0, "ComputePath.depth: 0.0 must be a share above 0, up to 1"),
        ({}, 1.5, "ComputePath.depth: 1.5 must be a share above 0, up to 1"),
    ],
)
def test_infeasible_paths_are_not_replaced_whittle_320(
    mod: Any, depth: float, message: str
) -> None:
    config = ModelConfig.model_validate(TINY | {"mod": mod})
    with pytest.raises(ConfigError, match=message):
        path_of(ComputePath(depth=depth), config)
    if mod is None:
        with pytest.raises(ValueError, match="depth of path 'p': the model has no depth routing"):
            ModelConfig.model_validate(TINY | {"paths": [{"name": "p", "depth": depth}]})
