"""Tasks of processes that train several modules together."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tests.distributed import tasks
from tests.unit.training.several_modules import registered
from ultrathink.recipes.resume import resume_trainer
from ultrathink.runs.folder import RunFolder


def train(place: str, *overrides: str) -> str:
    """Train a tiny run; returns its folder."""
    with registered():
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
            state = trainer.state_dict()
            kinds = ("model", "modules", "optimizer")
            return {kind: tasks.whole(state[kind]) for kind in kinds}
        finally:
            trainer.close()
