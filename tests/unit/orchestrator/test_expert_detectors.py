"""Groups of experts: collapse, imbalance, dead experts, dropped tokens."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.orchestrator.synthetic_runs import Columns, found, signals, watched

HEALTHY = {
    "gini": 0.2,
    "gini_of_noise": 0.05,
    "entropy_normalized": 0.6,
    "dead": 0.0,
    "dropped_share": 0.02,
    "even_load": 100.0,
}


def figures(count: int = 600, group: str = "knowledge", **changed: float) -> Columns:
    """Figures of a group, of which some change halfway."""
    rng = np.random.default_rng(0)
    later = np.arange(count) >= count // 2
    columns = {}
    for name, usual in HEALTHY.items():
        values = np.where(later, changed.get(name, usual), usual)
        columns[f"experts/{group}/{name}"] = values * np.exp(0.02 * rng.standard_normal(count))
    return columns


def test_healthy_groups_are_nothing() -> None:
    assert watched(signals({**figures(), **figures(group="skill")})).events == []


@pytest.mark.parametrize(
    ("kind", "severity", "changed"),
    [
        ("expert_collapse", "high", {"gini": 0.93}),
        ("expert_collapse", "medium", {"entropy_normalized": 0.01}),
        ("expert_imbalance", "medium", {"gini": 0.65}),
        ("expert_imbalance", "medium", {"gini": 0.48}),  # it rose
        ("dead_expert", "medium", {"dead": 2.0}),
        ("dropped_tokens", "medium", {"dropped_share": 0.2}),
    ],
)
def test_what_lasts_some_steps_is_reported(
    kind: str, severity: str, changed: dict[str, float]
) -> None:
    events = found({**figures(**changed), **figures(group="skill")}, kind)
    assert [(event.severity, event.subject) for event in events] == [(severity, "knowledge")]
    assert events[0].found_at == (351 if kind == "dead_expert" else 305)
    assert events[0].to_step == 600
    assert events[0].values["gini"] > 0


@pytest.mark.parametrize(
    "changed", [{"gini": 0.36}, {"entropy_normalized": 0.05}, {"dropped_share": 0.08}]
)
def test_less_is_nothing(changed: dict[str, float]) -> None:
    assert watched(signals(figures(**changed))).events == []


def test_four_steps_are_nothing() -> None:
    columns = figures()
    columns["experts/knowledge/gini"][300:304] = 0.95
    columns["experts/knowledge/dead"][320:324] = 1
    assert watched(signals(columns)).events == []


def test_an_expert_without_a_token_may_be_an_accident_where_few_are_sent() -> None:
    columns = figures(even_load=3.0, dead=1.0)
    assert found(columns, "dead_expert") == []
    del columns["experts/knowledge/even_load"]
    assert found(columns, "dead_expert")[0].found_at == 351


def test_a_group_that_is_still_finding_its_way_has_time() -> None:
    uneven = {"gini": 0.7, "dead": 2.0}
    always = {name: values[300:] for name, values in figures(1200, **uneven).items()}
    always = {name: values[300:] for name, values in always.items()}
    early = {name: values[200:] for name, values in figures(**uneven).items()}
    late = {name: values[90:] for name, values in figures(**uneven).items()}
    for kind, lasts in (("expert_imbalance", 5), ("dead_expert", 51)):
        assert [event.found_at for event in found(late, kind)] == [210 + lasts]
        assert [event.found_at for event in found(early, kind)] == [200]
    assert [event.found_at for event in found(always, "expert_imbalance")] == [301]


def test_unevenness_that_chance_explains_is_none() -> None:
    columns = figures(gini=0.7, gini_of_noise=0.6)
    assert watched(signals(columns)).events == []
