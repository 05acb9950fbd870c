"""Checkpoints while training continues: off its thread, and on disks that will not take them."""

import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.unit.checkpoint.disks import state, value_of
from tests.unit.monitoring import disks
from tests.unit.training.conftest import MakeTrainer
from tests.unit.training.observers import At, Recorder, final_state, records, without_time
from ultrathink.checkpoint.format import load_checkpoint, verify_checkpoint
from ultrathink.config.training import CheckpointConfig
from ultrathink.core.errors import CheckpointError
from ultrathink.recipes.resume import resume_trainer
from ultrathink.runs.folder import RunFolder
from ultrathink.training.callbacks import Callback, StepReport
from ultrathink.training.changes import Rollback
from ultrathink.training.saving import Saving
from ultrathink.training.trainer import Trainer

SAVE_OFTEN = "training.checkpoint={every_steps: 2, keep: 9, retry_s: 0.001}"


class During(Callback):
    """Calls ``actions[step]`` once that step is taken."""

    def __init__(self, **actions: object) -> None:
        self.actions = {int(name.removeprefix("step")): action for name, action in actions.items()}

    def on_step(self, report: StepReport) -> None:
        action = self.actions.get(report.step)
        if action is not None:
            action()  # type: ignore[operator]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MB of its own."""
    with disks.small_disk(tmp_path / "disk", "4m") as disk:
        yield disk


def fill_once_saved(trainer: Trainer, disk: Path) -> None:
    """Fill ``disk`` when nothing is being written to it."""
    trainer.saving.settle()
    disks.fill(disk)


def same_as_undisturbed(make_trainer: MakeTrainer, trainer: Trainer, *overrides: str) -> bool:
    whole = make_trainer(*overrides)
    whole.fit()
    one, other = final_state(whole.run), final_state(trainer.run)
    assert without_time(records(whole.run)) == without_time(records(trainer.run))
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_another_thread_saves_the_state_of_a_step_while_training_changes_it(
    make_trainer: MakeTrainer,
) -> None:
    kept: dict[int, torch.Tensor] = {}
    threads: set[threading.Thread] = set()

    class Weights(Callback):
        def on_step(self, report: StepReport) -> None:
            kept[report.step] = trainer.model.state_dict()["norm.weight"].clone()

    trainer = make_trainer("training.max_steps=8", SAVE_OFTEN, callbacks=[Weights()])
    save = type(trainer.run).save

    class Watched(type(trainer.run)):  # type: ignore[misc]
        def save(self, *args: object, **options: object) -> Path:
            threads.add(threading.current_thread())
            return save(self, *args, **options)  # type: ignore[arg-type]

    object.__setattr__(trainer.run, "__class__", Watched)
    trainer.fit()
    assert threads
    assert threading.main_thread() not in threads
    assert not any(thread.is_alive() for thread in threads)  # none is left behind
    for step in (2, 4, 6, 8):
        state = load_checkpoint(trainer.run.checkpoint(step))
        assert torch.equal(state["model"]["norm.weight"], kept[step])  # type: ignore[index,call-overload]
        assert state["progress"]["step"] == step  # type: ignore[index,call-overload]


def test_a_full_disk_warns_keeps_training_and_tries_again(
    make_trainer: MakeTrainer, small_disk: Path
) -> None:
    options = ("training.max_steps=12", SAVE_OFTEN, "monitoring.sinks=[jsonl]")
    recorder = Recorder()
    written: list[int] = []

    class Written(Callback):
        def on_checkpoint(self, step: int, path: Path) -> None:
            written.append(step)

    trainer = make_trainer(
        *options,
        f"run.dir={small_disk}",
        callbacks=[
            recorder,
            Written(),
            During(
                step3=lambda: fill_once_saved(trainer, small_disk),
                step9=(small_disk / "filler").unlink,
            ),
        ],
    )
    assert trainer.fit().name == "finished"
    reported = [text for text in recorder.messages if "could not be written" in text]
    assert reported[0].startswith("the checkpoint of step 4 could not be written: No space left on")
    assert "training continues, with a retry every 0.001 s" in reported[0]
    assert len(reported) == 1, "reported once, not at every try"
    assert written[0] == 2
    assert written[-1] == 12
    assert 4 not in trainer.run.steps()
    for step in trainer.run.steps():
        verify_checkpoint(trainer.run.checkpoint(step))
    log = (trainer.run.logs / "run.log").read_text()
    assert "No space left on device" in log
    assert same_as_undisturbed(make_trainer, trainer, *options)


def test_the_end_of_a_run_waits_for_room_on_the_disk(
    make_trainer: MakeTrainer, small_disk: Path
) -> None:
    recorder = Recorder()
    trainer = make_trainer(
        "training.max_steps=4",
        SAVE_OFTEN,
        f"run.dir={small_disk}",
        callbacks=[recorder, During(step3=lambda: fill_once_saved(trainer, small_disk))],
    )

    def make_room() -> None:
        deadline = time.monotonic() + 60
        while not any("waiting up to 60 minutes" in text for text in recorder.messages):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        (small_disk / "filler").unlink()

    helper = threading.Thread(target=make_room)
    helper.start()
    assert trainer.fit().name == "finished"
    helper.join()
    assert trainer.run.steps()[-1] == 4
    verify_checkpoint(trainer.run.checkpoint(4))


def test_patience_with_a_full_disk_ends(make_trainer: MakeTrainer, small_disk: Path) -> None:
    trainer = make_trainer(
        "training.max_steps=4",
        "training.checkpoint={every_steps: 2, retry_s: 0.001, patience_minutes: 0.001}",
        f"run.dir={small_disk}",
        callbacks=[During(step3=lambda: fill_once_saved(trainer, small_disk))],
    )
    with pytest.raises(CheckpointError, match="step 4 could not be written: No space left"):
        trainer.fit()
    assert trainer.run.steps() == [2]  # what was good is still there
    (small_disk / "filler").unlink()
    assert resume_trainer(trainer.run).fit().name == "finished"


@pytest.mark.parametrize("is_best", [False, True])
def test_a_best_state_that_waits_for_room_is_outlived_by_a_better_one_alone(
    small_disk: Path, *, is_best: bool
) -> None:
    written: list[int] = []
    run = RunFolder(small_disk / "run")
    saving = Saving(
        run,
        CheckpointConfig(keep=1, retry_s=0.001),
        on_written=lambda step, path: written.append(step),
        on_restored=lambda: None,
        report=lambda text, level: None,
    )
    disks.fill(small_disk)
    saving.save(4, state(4), is_best=True)
    saving.wait_for_outcome()
    assert written == []
    (small_disk / "filler").unlink()
    saving.save(6, state(6), is_best=is_best)  # nothing was tried again until now
    saving.wait_for_outcome()
    assert written == [6]
    saving.wait_until_written()
    saving.close()
    best = 6 if is_best else 4
    assert written == ([6] if is_best else [6, 4])
    assert value_of(load_checkpoint(run.checkpoints / "best")) == best
    assert value_of(load_checkpoint(run.checkpoints / "last")) == 6


def test_a_vanished_run_folder_is_made_again(make_trainer: MakeTrainer) -> None:
    recorder = Recorder()
    trainer = make_trainer(
        "training.max_steps=8",
        SAVE_OFTEN,
        callbacks=[recorder, During(step5=lambda: shutil.rmtree(trainer.run.path))],
    )
    assert trainer.fit().name == "finished"
    assert any("the run folder had vanished" in text for text in recorder.messages)
    assert trainer.run.steps()[-1] == 8
    longer = resume_trainer(trainer.run, overrides=["training.max_steps=10"])
    assert longer.fit().name == "finished"


def test_a_rollback_waits_for_the_checkpoint_under_way(make_trainer: MakeTrainer) -> None:
    snapshots: list[object] = []
    trainer = make_trainer(
        "training.max_steps=8",
        SAVE_OFTEN,
        controllers=[
            At(
                step2=lambda control: snapshots.append(control.snapshot()),
                step6=lambda control: (
                    control.request(Rollback(snapshots.pop(), skip_data=False), reason="test")
                    if snapshots
                    else None
                ),
            )
        ],
    )
    assert trainer.fit().name == "finished"
    assert trainer.run.steps() == [2, 4, 6, 8]
    for step in trainer.run.steps():
        state = load_checkpoint(trainer.run.checkpoint(step))
        assert state["progress"]["step"] == step  # type: ignore[index,call-overload]


def test_two_trainers_on_one_run_are_refused(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("training.max_steps=2")
    with pytest.raises(CheckpointError, match=f"in use by process {os.getpid()}"):
        resume_trainer(trainer.run)
    trainer.fit()
    longer = resume_trainer(trainer.run, overrides=["training.max_steps=3"])
    assert longer.fit().name == "finished"
