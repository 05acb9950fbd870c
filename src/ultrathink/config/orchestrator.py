"""Section ``orchestrator``: watching a run, and what may be changed where it goes wrong."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import model_validator

from ultrathink.config.base import Section, off_means
from ultrathink.config.options import free

Mode = Literal["off", "advise", "act"]


class RulesConfig(Section):
    """Which rules may act; docs/steering.md describes each with the results of its audits."""

    skip_outliers: bool = free(True)
    """Skip an update whose loss or gradient norm is an outlier."""
    correct_rate: bool = free(True)
    """Correct a learning rate that is not the scheduled one."""
    roll_back: bool = free(True)
    """Return to a snapshot from before a divergence."""
    revive_experts: bool = free(True)
    """Restart experts that stay without tokens as copies of busy ones, where a rollback cannot
    help."""
    save_memory: bool = free(True)
    """Recompute activations instead of keeping them as memory runs out."""
    stop_overfitting: bool = free(True)
    """End with the best weights once the held-out loss has risen far above its minimum."""
    find_rate: bool = free(True)
    """Where the first updates are too large, try lower learning rates and keep the best."""


class LimitsConfig(Section):
    """Limits of what the rules may do."""

    lr_factor: tuple[float, float] = free((0.01, 1.0))
    """Least and largest factor on the scheduled learning rate."""
    lr_correction: float = free(100.0, ge=1)
    """Largest factor by which a wrong learning rate is corrected."""
    memory: tuple[float, float] = free((0.7, 0.85))
    """Shares of memory in use above which activations are recomputed in part (selective, where that
    saves memory) and almost all (full)."""
    rollbacks: int = free(12, ge=0)
    """Largest number of rollbacks; 0 allows none at the end either."""
    skipped_share: float = free(0.25, ge=0, lt=1)
    """Largest share of 256 steps that may be skipped."""
    may_stop: bool = free(True)
    """Whether the run may be ended early."""

    @model_validator(mode="after")
    def _bounds_in_order(self) -> LimitsConfig:
        low, high = self.lr_factor
        if not 0 < low <= high:
            raise ValueError(
                f"lr_factor [{low:g}, {high:g}] leaves no room: give the least factor first, above "
                f"0 and not above the largest"
            )
        some, much = self.memory
        if not 0 < some <= much <= 1:
            raise ValueError(
                f"memory [{some:g}, {much:g}] are no two shares in order: give two numbers above "
                f"0 and up to 1, the smaller one first"
            )
        return self


class SnapshotsConfig(Section):
    """Copies of the whole state in memory, for rollbacks."""

    every_steps: int = free(50, gt=0)
    """Steps between snapshots."""
    max_gib: float | None = free(None, ge=0)
    """Memory of each process for snapshots, in GiB; a fifth of what is free when unset."""
    in_checkpoints: bool = free(True)
    """Keep the snapshots in checkpoints, too, so that a resumed run can roll back beyond its start;
    each takes the disk space of one checkpoint, once."""


class OrchestratorConfig(Section):
    """Watching a run while it trains, and steering it."""

    mode: Annotated[Mode, off_means("off")] = free("advise")
    """advise: detectors watch every step, report what goes wrong and write it to events.jsonl, and
    change nothing; act: rules also correct it, and write each decision to decisions.jsonl; off:
    nothing is watched."""
    rules: RulesConfig = RulesConfig()
    """Which rules may act."""
    limits: LimitsConfig = LimitsConfig()
    """Limits of the rules."""
    snapshots: SnapshotsConfig = SnapshotsConfig()
    """States for rollbacks."""

    audit: bool = free(False)
    """At the end of the run, audit the decisions whose states were kept: replay with and without
    each."""
    kept_states: int = free(2, ge=0)
    """The newest decisions whose state is kept on disk for an audit; each takes the space of one
    checkpoint, or of two after a rollback."""
