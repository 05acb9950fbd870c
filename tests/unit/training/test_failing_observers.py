"""What watches a run may fail, for real: training continues bit for bit, and the log says so."""

import errno
import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.unit.monitoring.disks import fill, small_disk
from tests.unit.training.conftest import MakeTrainer
from tests.unit.training.observers import (
    At,
    Recorder,
    asks,
    assert_equal_tensors,
    final_state,
    records,
    without_time,
)
from ultrathink.config.monitoring import SINKS
from ultrathink.monitoring.records import Level, MetricRecord, RunInfo, Sink
from ultrathink.runs.folder import RunFolder
from ultrathink.training.callbacks import Callback
from ultrathink.training.changes import SetLearningRateFactor
from ultrathink.training.control import TrainerControl

COMMON = (
    "training.max_steps=8",
    "model.dropout=0.1",
    "training.sample={prompts: ['the '], max_new_tokens: 4}",
    "monitoring.sinks=[jsonl, tensorboard]",
)


@pytest.fixture
def undisturbed(finished: MakeTrainer) -> RunFolder:
    run = finished(*COMMON).run
    assert [line for line in log_lines(run) if " warning: " in line] == []
    return run


def log_lines(run: RunFolder) -> list[str]:
    return (run.logs / "run.log").read_text().splitlines()


def reported(run: RunFolder) -> list[str]:
    """The messages of run.log, without their times."""
    return [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \w+: ", "", line) for line in log_lines(run)]


def scalar_steps(run: RunFolder) -> list[int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(run.path / "tensorboard"))
        events.Reload()
    return [event.step for event in events.Scalars("train/loss")]


def assert_same_training(one: RunFolder, other: RunFolder, from_step: int = 1) -> None:
    """Equal weights at the end, and equal figures from a step on."""
    assert_equal_tensors(final_state(one), final_state(other))
    figures = [
        [row for row in without_time(records(run)) if row["step"] >= from_step]
        for run in (one, other)
    ]
    assert figures[0] == figures[1]
    assert figures[0][-1]["step"] == one.steps()[-1]


def test_what_vanishes_is_created_again_and_training_does_not_notice(
    make_trainer: MakeTrainer, undisturbed: RunFolder
) -> None:
    def remove(_: object) -> None:
        shutil.rmtree(trainer.run.path / "tensorboard")
        shutil.rmtree(trainer.run.logs)
        trainer.run.metrics.unlink()

    def note(_: object) -> None:  # something to log, so that a missing log is noticed
        trainer.notify("on_message", "still here", "info")

    trainer = make_trainer(*COMMON, controllers=[At(step3=remove, step6=note)])
    assert trainer.fit().name == "finished"
    assert_same_training(trainer.run, undisturbed, from_step=4)
    assert "still here" in reported(trainer.run)
    lost = [text for text in reported(trainer.run) if "while the run wrote to it" in text]
    for name in ("events.out.tfevents", "metrics.jsonl", "run.log"):
        assert sum(name in text for text in lost) == 1, name
    steps = [row["step"] for row in records(trainer.run) if row["split"] == "train"]
    assert steps == scalar_steps(trainer.run) == [*range(4, 9)]


def test_a_disk_that_is_full_for_a_while_costs_no_record(
    make_trainer: MakeTrainer, finished: MakeTrainer, tmp_path: Path
) -> None:
    """Long enough that the last pages of the files, which are theirs already, are full as well."""
    undisturbed = finished(*COMMON, "training.max_steps=60").run

    def say(control: TrainerControl) -> None:
        trainer.notify("on_message", SAID, "info")
        control.request(SetLearningRateFactor(1.0), reason="test")

    with small_disk(tmp_path / "disk", "16m") as disk:
        saying: dict[str, Any] = {f"step{step}": say for step in range(10, 40)}
        damage = At(
            **saying,
            step8=lambda _: fill(disk),
            step40=lambda _: (disk / "filler").unlink(),
        )
        words = (*COMMON, "training.max_steps=60", f"run.dir={disk}")
        trainer = make_trainer(*words, controllers=[damage])
        assert trainer.fit().name == "finished"
        assert_same_training(trainer.run, undisturbed)
        assert scalar_steps(trainer.run) == [*range(1, 61)]
        decisions = [json.loads(line) for line in trainer.run.decisions.read_text().splitlines()]
        assert [decision["step"] for decision in decisions] == [*range(10, 40)]
        messages = reported(trainer.run)
        assert messages.count(SAID) == 30
        full = "failed: OSError: [Errno 28] No space left on device"
        for name in ("the jsonl sink", "the tensorboard sink", "logs/run.log", "decisions.jsonl"):
            assert len([text for text in messages if text.startswith(f"{name} {full}")]) == 1, name
            assert messages.count(f"{name} works again") == 1, name


SAID = "something worth a hundred and sixty characters, " * 4


def test_waiting_lines_of_the_log_are_written_as_soon_as_there_is_room(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """Not only with the next message, which may be days away."""
    with small_disk(tmp_path / "disk", "16m") as disk:
        seen: list[int] = []

        def say(_: object) -> None:
            for _ in range(40):
                trainer.notify("on_message", SAID, "info")

        damage = At(
            step2=lambda _: fill(disk),
            step3=say,
            step4=lambda _: (disk / "filler").unlink(),
            step6=lambda _: seen.append(reported(trainer.run).count(SAID)),
        )
        words = (*COMMON, "monitoring.sinks=[]", f"run.dir={disk}")
        trainer = make_trainer(*words, controllers=[damage])
        trainer.fit()
        assert seen == [40]


class BrokenSink(Sink):
    """Fails in every way there is."""

    def open(self, info: RunInfo) -> None:
        raise RuntimeError("no room")

    def progress(self, step: int) -> None:
        raise ValueError(f"at step {step}")

    def write(self, record: MetricRecord) -> None:
        raise OSError(errno.EIO, f"Input/output error at step {record.step}")

    def message(self, text: str, level: Level) -> None:
        raise KeyError(text)

    def sample(self, step: int, prompt: str, text: str) -> None:
        raise ZeroDivisionError

    def close(self) -> None:
        raise AttributeError("never opened")


def test_a_sink_that_fails_in_every_way_is_reported_once_for_each(
    make_trainer: MakeTrainer, undisturbed: RunFolder
) -> None:
    SINKS.add("broken", BrokenSink)  # until the fixtures forget what a test registered
    recorder = Recorder()
    trainer = make_trainer(
        *COMMON,
        "monitoring.sinks=[broken, jsonl, tensorboard]",
        "training.checkpoint={every_steps: 3, keep: 9}",
        callbacks=[recorder],
    )
    assert trainer.fit().name == "finished"
    assert_same_training(trainer.run, undisturbed)
    assert scalar_steps(trainer.run) == [*range(1, 9)]
    assert (trainer.run.path / "samples.jsonl").read_text().count("\n") == 1
    messages = reported(trainer.run)
    failures = [text for text in messages if text.startswith("the broken sink failed: ")]
    kinds = {text.split(": ")[1] for text in failures}
    assert kinds == {
        *("AttributeError", "KeyError", "OSError"),
        *("RuntimeError", "ValueError", "ZeroDivisionError"),
    }
    assert len(failures) == len(kinds)
    assert set(failures) <= set(recorder.messages)  # every callback hears of it
    written = [text for text in messages if text.startswith("checkpoint of step")]
    assert written == [f"checkpoint of step {step} written" for step in trainer.run.steps()]
    assert {3, 6, 8} <= set(trainer.run.steps())


class Events(Callback):
    """Keeps the names of the events in their order, those left out that may come at any time."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_") and name not in ("on_message", "on_checkpoint"):
            self.names.append(name.removeprefix("on_"))
        return super().__getattribute__(name)


def test_events_come_in_the_documented_order(make_trainer: MakeTrainer) -> None:
    events = Events()
    make_trainer(
        "training.max_steps=2",
        "training.eval.every_steps=1",
        callbacks=[events],
        controllers=[At(step1=asks(SetLearningRateFactor(0.5)))],
    ).fit()
    assert events.names == [
        "start", "budget", "step", "validation", "change", "step", "validation", "end",
    ]  # fmt: skip
