"""The watcher beside a real run: what it gets, what it reports, and that it changes nothing."""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.unit.training.conftest import MakeTrainer
from tests.unit.training.observers import At, Recorder, asks, goes_back, scale_loss
from ultrathink import resume_trainer
from ultrathink.monitoring.experts import ExpertStatistics, GroupSlots
from ultrathink.orchestrator.live import LiveWatch, step_signals
from ultrathink.runs.folder import RunFolder
from ultrathink.training.callbacks import StepReport
from ultrathink.training.changes import Stop
from ultrathink.training.trainer import Trainer

LONG = ("training.max_steps=60", "training.optimizer.lr=0.003")


def watch_of(trainer: Trainer) -> LiveWatch:
    (watch,) = [part for part in trainer.callbacks if isinstance(part, LiveWatch)]
    return watch


def kept(run: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.events.read_text().splitlines()]


def test_an_alarm_is_reported_and_kept_by_a_resumed_run_too(make_trainer: MakeTrainer) -> None:
    """A resumed run is watched as if it had not stopped."""
    recorder = Recorder()
    whole = make_trainer(*LONG, callbacks=[recorder])
    scale_loss(whole, range(50, 54), 3.0)
    whole.fit()
    spikes = [event for event in kept(whole.run) if event["kind"] == "loss_spike"]
    assert (spikes[0]["began"], spikes[0]["severity"]) == (50, "high")
    assert any(text.startswith("loss_spike at step 50 (high): ") for text in recorder.messages)
    assert "warning: loss_spike at step 50" in (whole.run.logs / "run.log").read_text()

    first = make_trainer(*LONG, controllers=[At(step45=asks(Stop()))])
    first.fit()
    second = resume_trainer(first.run)
    scale_loss(second, range(50, 54), 3.0)
    second.fit()
    of_the_machine = ("throughput_drop", "slow_step", "memory_leak", "memory_pressure")
    judged = [
        [
            (event.step, event.kind, event.severity)
            for event in watch_of(trainer).watcher.events
            if event.kind not in of_the_machine
        ]
        for trainer in (whole, second)
    ]
    assert judged[0] == judged[1]


def test_a_rollback_takes_the_watcher_back(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(*LONG, controllers=[goes_back(kept=40, at=52)])
    scale_loss(trainer, range(50, 53), 3.0)
    trainer.fit()
    kinds = [event.kind for event in watch_of(trainer).watcher.events]
    assert "resumed" not in kinds  # its memory went back with the run
    assert "divergence" not in kinds


def test_a_loss_is_passed_on_even_if_it_is_no_number_but_not_without_tokens() -> None:
    report = StepReport(3, math.nan, {}, 1.0, 0.1, 10, 30, 0.5, skipped=True, num_skipped=1)
    assert math.isnan(step_signals(report).values["loss"])
    values = step_signals(replace(report, loss=0.0, grad_norm=0.0, num_tokens=0)).values
    assert "loss" not in values
    assert "grad_norm" not in values
    assert values["skipped_steps"] == 1


def test_figures_of_experts_are_the_worst_of_the_layers() -> None:
    load = np.array([[10.0, 10, 10, 10], [40.0, 0, 0, 0]])
    dropped = np.array([[0.0, 0, 0, 0], [10.0, 0, 0, 0]])
    statistics = ExpertStatistics(
        groups=(GroupSlots("skill", 1, 0, 4),),
        layers=(0, 1),
        num_tokens=40,
        active=np.ones((2, 4), dtype=bool),
        load=load,
        dropped=dropped,
        probability=load,
        entropy=np.array([[40 * math.log(4)], [0.0]]),
        confidence=np.array([[10.0], [40.0]]),
    )
    report = StepReport(
        3, 2.0, {}, 1.0, 0.1, 40, 120, 0.5, skipped=False, num_skipped=0, experts=statistics
    )
    signals = step_signals(report).values
    assert signals["experts/skill/gini"] == pytest.approx(0.75)
    assert signals["experts/skill/dead"] == 3
    assert signals["experts/skill/even_load"] == 10
    assert signals["experts/skill/dropped_share"] == pytest.approx(10 / 80)
    assert signals["experts/skill/entropy_normalized"] == pytest.approx(0.0)
