"""Tasks of processes that train by objectives of the tests: of several modules, with weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tests.distributed import tasks
from tests.unit.training import weighted
from tests.unit.training.several_modules import registered
from ultrathink.recipes.resume import resume_trainer
from ultrathink.runs.folder import RunFolder
from ultrathink.training.changes import Rollback
from ultrathink.training.host_states import copied_to_host
from ultrathink.training.silent_changes import RecallCheckpoint
from ultrathink.training.snapshots import Snapshot
from ultrathink.training.trainer import Trainer


def train(place: str, *overrides: str) -> str:
    """Train a tiny run; returns its folder."""
    with registered(), weighted.registered():
        return tasks.train(place, *overrides)


def train_and_go_back(place: str, *overrides: str) -> str:
    """Go back to a snapshot on the way; returns the run's folder."""
    with registered():
        return tasks.train_with_a_controller(place, *overrides)[0]


def weights_at_rest(place: str, *overrides: str) -> dict[str, tuple[int, int]]:
    """How many numbers this process holds after a step, of each module, and how many there are."""
    with registered():
        return tasks.weights_at_rest(place, *overrides)


def loaded_state(path: str) -> dict[str, Any]:
    """What a trainer that resumes from the last checkpoint has of weights and moments, whole."""
    os.environ["ULTRATHINK_CACHE"] = str(Path(path).parents[1] / "cache")
    with registered():
        trainer = resume_trainer(RunFolder(Path(path)))
        try:
            return _learned(trainer)
        finally:
            trainer.close()


def recall(place: str, *overrides: str) -> list[dict[str, Any]]:
    """All weights and moments, whole: of a checkpoint's step, and once it was gone back to."""
    with registered():
        trainer = tasks.new_trainer(place, *overrides)
        found = []
        trainer.start()
        for number in range(3):
            trainer.train_step()
            if number == 1:
                trainer.save()
                found.append(_learned(trainer))
        RecallCheckpoint(2, 7).apply(trainer.parts)
        Rollback(Snapshot(2, 7), skip_data=False).apply(trainer.parts)
        found.append(_learned(trainer))
        trainer.close()
        return found


def _learned(trainer: Trainer) -> dict[str, Any]:
    state = copied_to_host(trainer.state_dict())
    return {kind: tasks.whole(state[kind]) for kind in ("model", "modules", "optimizer")}
