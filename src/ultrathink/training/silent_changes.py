"""Changes without a record: copies of a run's state, and measurements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ultrathink.training.change import Change

if TYPE_CHECKING:
    from ultrathink.training.parts import Parts


@dataclass(frozen=True)
class TakeSnapshot(Change):
    """Copy the current state."""

    name = "take_snapshot"
    snapshot_key: int
    in_checkpoints: bool = False

    def apply(self, run: Parts) -> None:
        state = run.state.state_dict()
        run.snapshots.take(self.snapshot_key, state, in_checkpoints=self.in_checkpoints)


@dataclass(frozen=True)
class ForgetSnapshot(Change):
    """Free the memory of a snapshot."""

    name = "forget_snapshot"
    snapshot_key: int

    def apply(self, run: Parts) -> None:
        run.snapshots.forget(self.snapshot_key)


@dataclass(frozen=True)
class KeepState(Change):
    """Write the current state, or that of a snapshot, to the run's folder for audits."""

    name = "keep_state"
    decision: int
    most_decisions: int  # keep the states of this many last decisions
    snapshot_key: int | None = None
    weights_only: bool = False

    def apply(self, run: Parts) -> None:
        key = self.snapshot_key
        state = run.state.state_dict() if key is None else run.snapshots.states[key]
        if self.weights_only:
            names = ("model", "modules", "progress")
            state = {name: state[name] for name in names if name in state}
        run.saving.keep_state(self.decision, key, state, most_decisions=self.most_decisions)


@dataclass(frozen=True)
class RecallCheckpoint(Change):
    """Read the checkpoint of ``step`` as a snapshot."""

    name = "recall_checkpoint"
    step: int
    snapshot_key: int

    def apply(self, run: Parts) -> None:
        from functools import partial

        from ultrathink.checkpoint.format import load_checkpoint
        from ultrathink.core.errors import CheckpointError, UltrathinkError
        from ultrathink.training.model_state import placed_state, region_needed

        run.saving.settle()
        run.world.barrier()  # complete once all have written
        error: UltrathinkError | None = None
        state = None
        try:
            region = partial(region_needed, run.models)
            folder, kind = run.run.step_path(self.step), run.saving.header.kind
            state = load_checkpoint(folder, region=region, kind=kind)
        except UltrathinkError as caught:
            error = caught
        except OSError as caught:
            error = CheckpointError(f"the checkpoint of step {self.step} is gone: {caught}.")
        run.world.raise_together(error)
        assert state is not None
        placed = placed_state(state, run.models, run.stepper.host_names)
        run.snapshots.keep(self.snapshot_key, placed, in_checkpoints=False)


@dataclass(frozen=True)
class ScoreHeldOut(Change):
    """Score held-out text outside the metrics; callbacks get it in ``on_scored``."""

    name = "score_held_out"

    def apply(self, run: Parts) -> None:
        scores = run.held_out()
        if scores is not None:
            run.report_scores(scores)
