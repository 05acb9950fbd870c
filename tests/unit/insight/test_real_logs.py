"""What is found, and what is not, in public training logs."""

from __future__ import annotations

import csv
from collections import Counter

import numpy as np
import pytest

from tests.unit.insight.shared_logs import read, shared_log
from tests.unit.orchestrator.synthetic_runs import watched
from ultrathink.orchestrator.phases import CONVERGING
from ultrathink.orchestrator.signals import Signals

COLUMNS = {"lm_loss": "loss", "loss_scale": "loss_scale", "lr": "lr", "iter_time_s": "step_time"}


@pytest.mark.parametrize(
    "name",
    ["megatron_gpt3_15b_h100.json", "mt5_az.json", "llmc_124M_main.log", "adamw_124M.log"],
)
def test_healthy_runs_raise_no_alarm_and_converge(name: str) -> None:
    watcher = watched(read(name))
    assert [event for event in watcher.events if event.is_alarm] == []
    steps = Counter[str]()
    for phase in watcher.phases:
        steps[phase.phase] += phase.to_step - phase.from_step
    assert steps[CONVERGING] > 0.9 * steps.total()


@pytest.mark.parametrize("name", ["muon_124M.csv", "soap_124M.csv"])
def test_jumps_that_recur_under_other_optimizers_are_hard_batches(name: str) -> None:
    events = watched(read(name)).events
    assert {event.kind for event in events} == {"hard_batch"}
    assert len(events) >= 20
    assert not any(event.is_alarm for event in events)


def test_hard_batches_are_the_same_under_two_optimizers() -> None:
    muon, soap = (
        {event.step for event in watched(read(name)).events}
        for name in ("muon_124M.csv", "soap_124M.csv")
    )
    assert len(muon & soap) >= 0.7 * len(muon)


def test_the_spike_of_mixtral_is_found_at_once() -> None:
    watcher = watched(read("megatron_mixtral8x7b_h100_spike.json"))
    alarms = [event for event in watcher.events if event.is_alarm]
    assert {event.kind for event in alarms} == {"loss_spike"}
    (spike,) = (event for event in alarms if event.step == 3850)
    assert spike.found_at <= 3855  # the next logged step
    assert spike.values["loss"] == pytest.approx(3.41, abs=0.01)
    assert len(alarms) <= 8


def test_gradient_spikes_above_ten_times_the_median_are_found() -> None:
    run = read("star_spec_decode.json")
    norms = [(one.step, one.values["grad_norm"]) for one in run if "grad_norm" in one.values]
    before: list[float] = []
    spikes = []
    for step, norm in norms:
        if len(before) >= 20 and norm > 10 * np.median(before[-100:]):
            spikes.append(step)
        before.append(norm)
    assert len(spikes) >= 2
    alarms = [event for event in watched(run).events if event.is_alarm]
    assert all(any(event.step <= step <= event.to_step for event in alarms) for step in spikes)
    assert len(alarms) <= 4  # in 40,000 steps


def test_a_divergence_in_the_first_steps_is_found_and_its_healthy_twin_is_not() -> None:
    (event,) = (one for one in watched(read("deepspeed_7b_bf16_loss.csv")).events if one.is_alarm)
    assert (event.kind, event.step) == ("divergence", 3)
    assert not any(one.is_alarm for one in watched(read("deepspeed_7b_baseline_loss.csv")).events)


def test_steps_skipped_while_an_fp16_scale_is_searched_are_no_alarm() -> None:
    run = read("deepspeed_fp16_overflow.log")
    assert run[-1].values["skipped_steps"] > 0
    events = watched(run).events
    assert {event.kind for event in events} == {"skipped_steps"}
    assert not any(event.is_alarm for event in events)


def test_the_divergences_of_bloom_are_seen_in_a_few_lines() -> None:
    runs: dict[tuple[str, int], list[Signals]] = {}
    last = 0
    with shared_log("bloom_iteration_lines.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            step = int(row["iteration"])
            if not 0 < step - last <= 10:  # another stretch of lines
                begin = step
            last = step
            values = {name: float(row[key]) for key, name in COLUMNS.items() if row[key]}
            if float(row["grad_norm"]):
                values["grad_norm"] = float(row["grad_norm"])
            runs.setdefault((row["source"], begin), []).append(Signals(step, values))
    found = {
        begin: {event.kind for event in watched(run).events if event.is_alarm}
        for (_, begin), run in runs.items()
    }
    assert {begin for begin, kinds in found.items() if "divergence" in kinds} >= {29020, 17060}
    healthy = {33240, 43680, 6502, 12000, 14000, 16800, 12695, 31250, 45000}
    assert not any(found[begin] for begin in healthy)
