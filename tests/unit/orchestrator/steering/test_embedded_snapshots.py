"""Snapshots in checkpoints: a resumed run goes back to before its start, as one never stopped."""

import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.sharing import Shared
from tests.unit.orchestrator.steering.broken_runs import (
    ACT,
    RUN,
    Breaks,
    broken_run,
    decisions,
    scale_a_weight,
    steering_of,
)
from tests.unit.training.conftest import TINY, MakeTrainer, make_trainer
from tests.unit.training.observers import At, asks, final_state, records
from ultrathink import build_trainer, load_config
from ultrathink.checkpoint.format import CHECKSUM_FILE, load_checkpoint, read_state
from ultrathink.checkpoint.snapshots import embedded_steps, snapshot_path
from ultrathink.cli.main import main
from ultrathink.orchestrator.steering import find_rate
from ultrathink.recipes.resume import resume_trainer
from ultrathink.runs.checking import check_run
from ultrathink.runs.decisions import read_decisions
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.listing import size_on_disk
from ultrathink.training.callbacks import Controller, StepReport
from ultrathink.training.changes import Stop
from ultrathink.training.control import TrainerControl
from ultrathink.training.trainer import Trainer

__all__ = ["make_trainer"]


@pytest.fixture(scope="session")
def stopped_once(shared: Shared) -> Path:
    def fill(folder: Path) -> None:
        words = (*TINY, *RUN, ACT, f"run.dir={folder}", "run.name=stopped")
        stop = At(step106=asks(Stop()))
        trainer = build_trainer(load_config("debug", words), controllers=[stop])
        assert trainer.fit().name == "stopped"

    return shared.folder("steered", fill) / "stopped"


@pytest.fixture
def stopped(stopped_once: Path, tmp_path: Path) -> RunFolder:
    """A copy of a steered run that was stopped after step 106."""
    run = RunFolder(Path(shutil.copytree(stopped_once, tmp_path / "stopped", symlinks=True)))
    assert len(embedded_steps(read_state(run.checkpoint()))) > 3
    return run


SAVES_OFTEN = "training.checkpoint={every_steps: 10, keep: 3}"


def broken_after_a_resume(make: MakeTrainer, *overrides: str) -> Trainer:
    """Stop after step 106, go on, and break the weights after step 110."""
    stop = At(step106=asks(Stop()))
    trainer = make(*RUN, ACT, *overrides, controllers=[stop])
    assert trainer.fit().name == "stopped"
    return resumed_and_broken(trainer.run)


def resumed_and_broken(run: RunFolder, *overrides: str) -> Trainer:
    breaks = Breaks(110, scale_a_weight)
    trainer = resume_trainer(run, overrides=overrides, callbacks=[breaks])
    breaks.trainer = trainer
    trainer.fit()
    return trainer


def without_clock(node: Any) -> Any:
    """State or records less what a clock or the machine decides."""
    dropped = ("time", "tokens_per_sec", "memory_gib", "data_wait", "elapsed_s", "mfu")
    if isinstance(node, dict):
        return {
            key: without_clock(value)
            for key, value in node.items()
            if key not in dropped and not key.startswith("last_checkpoint")
        }
    return [without_clock(one) for one in node] if isinstance(node, list) else node


def test_it_goes_back_to_before_a_resume_as_if_there_had_been_none(
    make_trainer: MakeTrainer,
) -> None:
    whole = broken_run(make_trainer, 110, scale_a_weight, ACT, SAVES_OFTEN)
    again = broken_after_a_resume(make_trainer, SAVES_OFTEN)
    [rollback] = decisions(again, "roll_back")
    assert (rollback["before"] > 110, rollback["after"]) == (True, 101)
    one, other = final_state(whole.run), final_state(again.run)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    by_hand = [record["rule"] for record in read_decisions(again.run.decisions)]
    assert by_hand.count("by_hand") == 1  # the stop
    assert without_clock(read_decisions(whole.run.decisions)) == without_clock(
        [one for one in read_decisions(again.run.decisions) if one["rule"] != "by_hand"]
    )
    assert without_clock(records(whole.run)) == without_clock(records(again.run))
    rings = [steering_of(one).state_dict()["snapshots"] for one in (whole, again)]
    assert rings[0] == rings[1]
    held = [embedded_steps(read_state(one.run.checkpoint())) for one in (whole, again)]
    assert held[0] == held[1]
    assert len(held[0]) > 3
    for step in held[0]:
        copies = [snapshot_path(one.run.checkpoint().resolve(), step) for one in (whole, again)]
        states = [load_checkpoint(copy) for copy in copies]
        assert all(
            torch.equal(states[0]["model"][name], states[1]["model"][name])  # type: ignore[index, call-overload]
            for name in states[0]["model"]  # type: ignore[union-attr]
        )
        assert "snapshots" not in states[0]
    assert_shared_snapshots_are_written_once(again.run)


def assert_shared_snapshots_are_written_once(run: RunFolder) -> None:
    names: dict[tuple[int, int], int] = {}
    for step in run.steps():
        folder = run.step_path(step)
        for one in embedded_steps(read_state(folder)):
            inode = (snapshot_path(folder, one) / CHECKSUM_FILE).stat().st_ino
            names[inode, one] = names.get((inode, one), 0) + 1
    assert len(run.steps()) == 3
    assert len(names) == len({step for _, step in names})  # one file for each, in all checkpoints
    assert max(names.values()) == 3
    assert check_run(run).is_sound
    held = sum(f.stat().st_size for f in run.path.rglob("*") if f.is_file())
    assert size_on_disk(run.path) < 0.7 * held


def test_what_was_read_from_a_checkpoint_is_not_written_again(stopped: RunFolder) -> None:
    written = (snapshot_path(stopped.checkpoint(), 101) / CHECKSUM_FILE).stat().st_ino
    again = resume_trainer(stopped, overrides=["training.checkpoint.every_steps=120"])
    again.fit()
    for folder in (stopped.step_path(120), stopped.step_path(140)):
        assert (snapshot_path(folder, 101) / CHECKSUM_FILE).stat().st_ino == written


@pytest.mark.parametrize("mode", ["off", "advise", "act"])
def test_only_a_steered_run_that_may_writes_snapshots(make_trainer: MakeTrainer, mode: str) -> None:
    words = () if mode != "act" else ("orchestrator.snapshots.in_checkpoints=false",)
    trainer = make_trainer(
        *RUN, f"orchestrator.mode={mode}", *words, "training.max_steps=4", SAVES_OFTEN
    )
    trainer.fit()
    last = trainer.run.checkpoint()
    assert sorted(path.name for path in last.iterdir()) == [
        "checksums.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "state.json",
    ]
    state = read_state(last)
    assert "snapshots" not in state
    assert not state.get("controller.Steering", {}).get("snapshots")


def test_without_them_a_resumed_run_goes_back_to_its_start(make_trainer: MakeTrainer) -> None:
    again = broken_after_a_resume(make_trainer, "orchestrator.snapshots.in_checkpoints=false")
    [rollback] = decisions(again, "roll_back")
    assert rollback["after"] == 107


def test_they_are_listed(stopped: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    held = embedded_steps(read_state(stopped.checkpoint()))
    assert main(["checkpoint", "info", str(stopped.path)]) == 0
    listed = ", ".join(map(str, held))
    assert f"which checkpoints share: step {listed}\n" in capsys.readouterr().out
    assert main(["checkpoint", "info", str(stopped.path), "--json"]) == 0
    reported = json.loads(capsys.readouterr().out)["snapshots"]
    assert [one["step"] for one in reported] == held
    assert min(one["size_bytes"] for one in reported) > 10_000


def damage_of(run: RunFolder, kind: str) -> str:
    newest = snapshot_path(run.checkpoint(), 101)
    if kind == "missing":
        shutil.rmtree(newest)
        return "step_00000101 is missing"
    tensors = newest / "model-00001-of-00002.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    return "content differs from its checksum"


@pytest.mark.parametrize("kind", ["missing", "damaged"])
def test_a_snapshot_that_is_lost_is_reported_and_done_without(
    stopped: RunFolder, kind: str
) -> None:
    problem = damage_of(stopped, kind)
    check = check_run(stopped)
    assert [f.item for f in check.findings if f.status == "damaged"] == [
        "checkpoints/step_00000106/snapshots/step_00000101"
    ]
    assert check.can_resume
    again = resumed_and_broken(stopped)
    [reported] = [text for text, _ in again.remarks if "snapshot" in text]
    assert reported.startswith("the run cannot roll back to the snapshot of step 101")
    assert problem in reported
    [rollback] = decisions(again, "roll_back")
    assert rollback["after"] in (81, 107)  # the one before it, or one taken since


def test_a_run_that_continues_with_changes_begins_with_none(stopped: RunFolder) -> None:
    again = resumed_and_broken(stopped, "training.optimizer.lr=0.002")
    [reported] = [text for text, _ in again.remarks if "snapshots" in text]
    assert "resumes with changes, so it cannot roll back to before step 106" in reported
    [rollback] = decisions(again, "roll_back")
    assert rollback["after"] == 107


def test_what_training_does_not_feel_changes_nothing_of_them(stopped: RunFolder) -> None:
    again = resumed_and_broken(stopped, "training.checkpoint.keep=5", "training.eval.every_steps=7")
    [rollback] = decisions(again, "roll_back")
    assert rollback["after"] == 101
    assert again.settings.eval_every == 7, "as configured since"


def test_where_memory_is_short_the_newest_are_brought_back(stopped: RunFolder) -> None:
    held = embedded_steps(read_state(stopped.checkpoint()))
    one = sum(f.stat().st_size for f in snapshot_path(stopped.checkpoint(), 101).iterdir()) / 2**30
    again = resume_trainer(stopped, overrides=[f"orchestrator.snapshots.max_gib={2.5 * one}"])
    [reported] = [text for text, _ in again.remarks if "memory" in text]
    assert reported.startswith(f"there is memory for 2 of the {len(held)} snapshots")
    again.fit()
    assert len(steering_of(again).snapshots.steps) <= 2  # type: ignore[union-attr]


def test_a_decision_of_the_last_boundary_before_a_kill_is_written_down(
    make_trainer: MakeTrainer,
) -> None:
    """Its checkpoint has it; its line would have come with the next step."""

    def lower_rate(trainer: Trainer) -> None:
        for group in trainer.stepper.optimizers[0].param_groups:
            group["peak_lr"] /= 50

    words = ("training.max_steps=70", "training.checkpoint={every_steps: 61, keep: 9}")
    run = broken_run(make_trainer, 60, lower_rate, ACT, *words).run
    [decision] = read_decisions(run.decisions)
    assert (decision["step"], decision["action"]) == (61, "lr_correction")  # and no rollback
    run.remove_after(61)
    run.decisions.write_bytes(b"")  # as the kill would have left it
    again = resume_trainer(run)
    again.start()
    again.close()
    assert without_clock(read_decisions(run.decisions)) == without_clock(
        [{**decision, "outcome": None}]
    )


def test_a_finished_run_that_was_steered_leaves_no_memory_behind(
    make_trainer: MakeTrainer,
) -> None:
    trainer = make_trainer(*RUN, ACT, "training.max_steps=4")
    trainer.fit()
    gone = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert gone() is None


def test_a_trial_of_rates_continues_after_a_resume(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it goes back to is in the checkpoint: its beginning, and the best rate's end."""
    monkeypatch.setattr(find_rate, "LARGE_UPDATE", 0.0)
    words = ("training.max_steps=330", "training.optimizer.lr=0.03", SAVES_OFTEN)
    whole = make_trainer(*RUN, ACT, *words)
    whole.fit()
    stop = StopsAfter(60)
    trainer = make_trainer(*RUN, ACT, *words, controllers=[stop])
    assert trainer.fit().name == "stopped"
    assert set(steering_of(trainer).snapshots.held) == {"start", "best"}  # type: ignore[union-attr]
    again = resume_trainer(trainer.run)
    again.fit()
    one, other = final_state(whole.run), final_state(again.run)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert whole.settings.lr_scale == again.settings.lr_scale
    assert len(decisions(whole, "find_rate")) == len(decisions(again, "find_rate")) > 1


class StopsAfter(Controller):
    """Stops a run after so many steps, those that were undone among them."""

    def __init__(self, count: int) -> None:
        self.left = count

    def at_boundary(self, report: StepReport, control: TrainerControl) -> None:
        self.left -= 1
        if self.left == 0:
            control.request(Stop(), reason="test")
