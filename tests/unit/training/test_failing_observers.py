"""What watches a run may fail, for real: training continues bit for bit, and the log says so."""

import errno
import json
import re
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.monitoring.disks import fill, small_disk
from tests.unit.training.conftest import MakeTrainer
from tests.unit.training.observers import At, Recorder, asks, final_state, records, without_time
from ultrathink.config.monitoring import SINKS
from ultrathink.monitoring.records import Level, MetricRecord, RunInfo, Sink
from ultrathink.runs.folder import RunFolder
from ultrathink.training.callbacks import Callback, StepReport
from ultrathink.training.changes import SetLearningRateFactor
from ultrathink.training.trainer import Trainer

COMMON = (
    "training.max_steps=8",
    "model.dropout=0.1",
    "training.sample={prompts: ['the '], max_new_tokens: 4}",
    "monitoring.sinks=[jsonl, tensorboard]",
)


class Damage(Callback):
    """Runs ``actions[step]`` with the run's folder after that step, before anybody hears of it."""

    def __init__(self, **actions: Callable[[Path], object]) -> None:
        self.actions = {int(name.removeprefix("step")): action for name, action in actions.items()}

    def on_start(self, info: RunInfo) -> None:
        self.folder = info.folder

    def on_step(self, report: StepReport) -> None:
        if report.step in self.actions:
            self.actions[report.step](self.folder)


@pytest.fixture
def undisturbed(make_trainer: MakeTrainer) -> RunFolder:
    trainer = make_trainer(*COMMON)
    trainer.fit()
    assert [line for line in log_lines(trainer.run) if " warning: " in line] == []
    return trainer.run


def trained(make_trainer: MakeTrainer, *overrides: str, **parts: Any) -> Trainer:
    trainer = make_trainer(*COMMON, *overrides, **parts)
    assert trainer.fit().name == "finished"
    return trainer


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


def assert_same_training(one: RunFolder, other: RunFolder, steps: Sequence[int]) -> None:
    """Equal weights at the end, and equal figures of ``steps``."""
    weights, expected = final_state(one), final_state(other)
    assert [name for name in expected if not torch.equal(weights[name], expected[name])] == []
    figures = [
        [row for row in without_time(records(run)) if row["step"] in steps] for run in (one, other)
    ]
    assert len(figures[1]) >= len(steps)
    assert figures[0] == figures[1]


ALL = range(1, 9)


@pytest.mark.parametrize(
    ("victim", "kept_steps", "message"),
    [
        ("tensorboard", ALL, "events.out.tfevents"),
        ("metrics.jsonl", range(4, 9), "metrics.jsonl was deleted or moved"),
        ("logs", ALL, "run.log was deleted or moved"),
    ],
)
def test_what_vanishes_is_created_again_and_training_does_not_notice(
    victim: str,
    kept_steps: Sequence[int],
    message: str,
    make_trainer: MakeTrainer,
    undisturbed: RunFolder,
) -> None:
    def remove(folder: Path) -> None:
        path = folder / victim
        (shutil.rmtree if path.is_dir() else Path.unlink)(path)

    def note(folder: Path) -> None:  # something to log, so that a missing log is noticed
        trainer.notify("on_message", "still here", "info")

    trainer = make_trainer(*COMMON, callbacks=[Damage(step4=remove, step6=note)])
    assert trainer.fit().name == "finished"
    assert_same_training(trainer.run, undisturbed, kept_steps)
    assert "still here" in reported(trainer.run)
    (lost,) = [text for text in reported(trainer.run) if "while the run wrote to it" in text]
    assert message in lost
    assert [row["step"] for row in records(trainer.run) if row["split"] == "train"] == [*kept_steps]
    assert scalar_steps(trainer.run) == [*(range(4, 9) if victim == "tensorboard" else ALL)]


def test_a_disk_that_is_full_for_a_while_costs_no_record(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """Long enough that the last pages of the files, which are theirs already, are full as well."""
    every = range(1, 61)
    undisturbed = trained(make_trainer, "training.max_steps=60").run
    with small_disk(tmp_path / "disk", "16m") as disk:
        saying = {f"step{step}": lambda _: trainer.notify("on_message", SAID, "info") for step in
                  range(10, 40)}  # fmt: skip
        changing = {f"step{step}": asks(SetLearningRateFactor(1.0))
                    for step in range(10, 40)}  # fmt: skip
        trainer = make_trainer(
            *COMMON,
            "training.max_steps=60",
            f"run.dir={disk}",
            callbacks=[
                Damage(
                    **saying,
                    step8=lambda folder: fill(disk),
                    step40=lambda folder: (disk / "filler").unlink(),
                )
            ],
            controllers=[At(**changing)],
        )
        assert trainer.fit().name == "finished"
        assert_same_training(trainer.run, undisturbed, every)
        assert scalar_steps(trainer.run) == [*every]
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

        def say(folder: Path) -> None:
            for _ in range(40):
                trainer.notify("on_message", SAID, "info")

        trainer = make_trainer(
            *COMMON,
            "monitoring.sinks=[]",
            f"run.dir={disk}",
            callbacks=[
                Damage(
                    step2=lambda folder: fill(disk),
                    step3=say,
                    step4=lambda folder: (disk / "filler").unlink(),
                    step6=lambda folder: seen.append(reported(trainer.run).count(SAID)),
                )
            ],
        )
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
    trainer = trained(
        make_trainer, "monitoring.sinks=[broken, jsonl, tensorboard]", callbacks=[recorder]
    )
    assert_same_training(trainer.run, undisturbed, ALL)
    assert scalar_steps(trainer.run) == [*ALL]
    assert (trainer.run.path / "samples.jsonl").read_text().count("\n") == 1
    failures = [
        text for text in reported(trainer.run) if text.startswith("the broken sink failed: ")
    ]
    kinds = [text.split(": ")[1] for text in failures]
    assert sorted(kinds) == [
        "AttributeError",
        "KeyError",
        "OSError",
        "RuntimeError",
        "ValueError",
        "ZeroDivisionError",
    ]
    assert set(failures) <= set(recorder.messages)  # every callback hears of it


def test_checkpoints_are_in_the_log(make_trainer: MakeTrainer) -> None:
    trainer = trained(make_trainer, "training.checkpoint={every_steps: 3, keep: 9}")
    written = [text for text in reported(trainer.run) if text.startswith("checkpoint of step")]
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
