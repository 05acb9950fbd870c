"""Whether there is anything left of a run."""

from __future__ import annotations

from ultrathink.runs.checkpoint import read_state
from ultrathink.runs.folder import RunFolder
from ultrathink.training.budget import Budget


def finished_step(run: RunFolder, checkpoint: str = "last") -> int | None:
    """The step of a checkpoint where the run's budget is used up, None where some is left."""
    state = read_state(run.checkpoint(checkpoint))
    step: int = state["progress"]["step"]
    budget = Budget(**state["budget"])
    limit = run.read_config().training.max_minutes
    is_out_of_time = (
        limit is not None and state["progress"]["elapsed_s"] >= limit * 60 - budget.reserve_s
    )
    return step if step >= budget.total_steps or is_out_of_time else None
