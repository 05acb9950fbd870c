"""Scores against loops that count one by one."""

import math
import statistics
from dataclasses import replace

import numpy as np
import pytest

from tests.unit.benchmarks import conftest  # noqa: F401 - makes the benchmarks importable

# isort: split
from fault_scoring import Alarms, Results, Run, delay_of, incident_starts

SEEDS = range(3)
TWIN_LOSSES = {0: 2.0, 1: 2.02, 2: 1.98}
GROUPS = {"a": "loss", "b": "loss", "c": "data", "leak": "resources"}


def drawn_runs(seed: int) -> list[Run]:
    """Runs of four faults and two controllers, with losses that are drawn."""
    draw = np.random.default_rng(seed)
    runs = []
    for number in SEEDS:
        for controller in ("none", "mine"):
            twin = Run(controller, number, "dense", TWIN_LOSSES[number], 100, is_twin=True)
            own = (
                tuple(int(step) for step in draw.integers(1, 100, 3))
                if controller != "none"
                else ()
            )
            runs.append(replace(twin, interventions=own, seconds=10.0))
            for fault, group in GROUPS.items():
                ratio = float(draw.choice([1.0, 1.005, 1.02, 1.05, 1.3, math.inf]))
                died = "MemoryError" if ratio == math.inf and draw.random() < 0.5 else None
                loss = None if ratio == math.inf else ratio * TWIN_LOSSES[number]
                steps = tuple(int(step) for step in draw.integers(1, 100, 2))
                runs.append(
                    Run(
                        controller, number, "dense", loss, 100, steps, fault, group, 50, died,
                        seconds=float(draw.uniform(10, 30)),
                    )
                )  # fmt: skip
    runs.append(Run("none", 1000, "dense", 1.7, 700))
    runs.append(Run("mine", 1000, "dense", 1.7, 700, (5, 9, 40, 48, 57)))
    return runs


@pytest.mark.parametrize("seed", range(8))
def test_figures_of_a_controller_by_counting(seed: int) -> None:
    runs = drawn_runs(seed)
    results = Results(runs)
    deviation = statistics.stdev(TWIN_LOSSES.values()) / statistics.fmean(TWIN_LOSSES.values())
    tolerance = max(0.01, 2 * deviation)
    assert results.tolerance("dense") == pytest.approx(tolerance)

    def ratio(run: Run) -> float:
        return math.inf if run.loss is None else run.loss / TWIN_LOSSES[run.seed]

    harmful = {
        (run.fault, run.seed)
        for run in runs
        if run.controller == "none" and run.fault and ratio(run) > 1.01
    }
    for name in ("none", "mine"):
        seen, recovered, close, failed, count, total, delays, ratios = 0, 0, 0, 0, 0, 0, [], []
        for run in runs:
            if run.controller != name or not run.fault or run.group == "resources":
                continue
            total += 1
            failed += ratio(run) > 1.10
            ratios.append(ratio(run))
            if (run.fault, run.seed) in harmful:
                count += 1
                recovered += ratio(run) <= 1 + tolerance
                close += ratio(run) <= 1.01
                later = [step for step in sorted(run.interventions) if step >= 50]
                if later:
                    seen += 1
                    delays.append(later[0] - 50)
        figures = results.of_controller(name)
        assert figures["num_runs"] == total == 9
        assert figures["num_harmful"] == count
        assert figures["recall"] == (seen / count if count else None)
        assert figures["recovered_share"] == (recovered / count if count else None)
        assert figures["within_1_percent_share"] == (close / count if count else None)
        assert figures["failed_share"] == failed / total
        assert figures["delay_steps_median"] == (np.median(delays) if delays else None)
        middle = float(np.median(ratios))
        expected = pytest.approx(middle) if math.isfinite(middle) else None
        assert figures["final_loss_ratio_median"] == expected
        assert figures["healthy_steps"] == 1000
        deaths = [
            run.died is not None for run in runs if run.fault == "leak" and run.controller == name
        ]
        assert figures["resources"]["died_share"] == sum(deaths) / 3


def test_false_alarms_are_incidents_in_healthy_runs() -> None:
    runs = [run for run in drawn_runs(0) if run.seed == 1000]
    twin = Run("none", 0, "dense", 2.0, 300, is_twin=True)
    results = Results([*runs, twin, replace(twin, controller="mine", interventions=(1, 2, 3))])
    assert incident_starts((5, 9, 40, 48, 57)) == [5, 40, 57]
    assert results.of_controller("mine")["false_alarms_per_10k"] == 10_000 * 4 / 1000
    assert results.of_controller("none")["false_alarms_per_10k"] == 0


def test_only_what_comes_after_the_injection_counts() -> None:
    assert delay_of([3, 49], 50) is None
    assert delay_of([60, 3, 50], 50) == 0
    assert delay_of([80, 60], 50) == 10


def test_a_single_seed_has_no_sigma() -> None:
    twins = [Run("none", 0, "dense", 2.0, 10, is_twin=True)]
    assert Results(twins).tolerance("dense") == 0.01


def test_harm_is_that_of_the_bare_trainer() -> None:
    twin = Run("none", 0, "dense", 2.0, 10, is_twin=True)
    bare = Run("none", 0, "dense", 2.021, 10, (), "a", "loss", 5)
    assert Results([twin, bare]).is_harmful("a", 0)
    assert not Results([twin, replace(bare, loss=2.019)]).is_harmful("a", 0)
    assert Results([twin, replace(bare, loss=None)]).is_harmful("a", 0)
    mine = replace(bare, controller="mine", loss=3.0)
    assert not Results([twin, replace(bare, loss=2.0), mine]).is_harmful("a", 0)


def test_detectors_are_scored_over_bare_runs() -> None:
    twin = Run("none", 0, "dense", 2.0, 10, is_twin=True)
    harmful = Run("none", 0, "dense", 2.5, 10, (), "a", "loss", 50)
    harmless = replace(harmful, fault="b", loss=2.0)
    missed = replace(harmful, fault="c", group="data")
    leak = replace(harmful, fault="leak", group="resources", loss=2.0)
    alarms = {
        twin: Alarms(((30, "loss spike"), (40, "throughput_drop"), (90, "throughput_drop")), 2000),
        harmful: Alarms(((30, "loss spike"), (57, "divergence")), 100),
        harmless: Alarms((), 100),
        missed: Alarms(((30, "loss spike"), (60, "throughput_drop")), 100),
        leak: Alarms(((60, "loss spike"), (70, "memory_leak")), 100),
    }
    figures = Results(list(alarms)).of_detectors(alarms)
    assert figures["num_harmful"] == 2
    assert figures["recall"] == 0.5
    assert figures["delay_steps_median"] == 7
    assert figures["false_alarms_per_10k"] == 5
    assert figures["healthy_steps"] == 2000
    assert figures["resource_alarms_per_10k"] == 10
    assert figures["alarms_in_healthy_runs"] == {"loss spike": 1, "throughput_drop": 2}
    assert figures["resources_recall"] == 1
    assert figures["faults"]["leak"]["delay_steps_median"] == 20
    assert figures["faults"]["a"]["kinds"] == ["divergence"]


def test_resources_are_reported_in_time_and_memory() -> None:
    twin = Run("none", 0, "dense", 2.0, 10, is_twin=True, seconds=10, memory_growth_gib=0.1)
    slow = Run("none", 0, "dense", 2.0, 10, (), "slow", "resources", 5, seconds=25)
    dead = replace(slow, fault="dead", loss=None, died="MemoryError: no")
    results = Results([twin, slow, dead])
    assert results.of_fault("slow")["controllers"]["none"]["time_ratio"] == 2.5
    assert results.of_fault("slow")["controllers"]["none"]["memory_growth_gib"] == -0.1
    figures = results.of_fault("dead")["controllers"]["none"]
    assert figures["died_share"] == 1
    assert figures["time_ratio"] is None
    assert figures["died_of"] == ["MemoryError: no"]
