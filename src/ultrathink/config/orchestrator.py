"""Section ``orchestrator``: who watches the run, and what may be done about what is seen."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ultrathink.config.base import Section, off_means
from ultrathink.config.options import free

Mode = Literal["off", "advise", "act"]


class RulesConfig(Section):
    """Which rules may act; docs/steering.md says what each does and what its audits show."""

    skip_outliers: bool = free(
        True, description="Leave out an update whose loss or gradient norm is unlike all before."
    )
    correct_rate: bool = free(
        True, description="Make up for a learning rate that is not the scheduled one."
    )
    roll_back: bool = free(True, description="Go back to a snapshot from before the run broke.")
    revive_experts: bool = free(
        True,
        description="Begin experts that stay without tokens anew, as copies of busy ones, where "
        "going back cannot help.",
    )
    save_memory: bool = free(
        True, description="Compute activations again rather than keep them as memory runs short."
    )
    stop_overfitting: bool = free(
        True, description="End with the best weights once the held-out loss has risen far above."
    )
    find_rate: bool = free(
        True,
        description="Try lower learning rates on the first steps where updates are too large, and "
        "take the best.",
    )


class LimitsConfig(Section):
    """What the policy may do at most."""

    lr_factor: tuple[float, float] = free(
        (0.01, 1.0), description="Least and largest factor on the scheduled learning rate."
    )
    lr_correction: float = free(
        100.0, ge=1, description="By how much a rate that is off may be corrected, either way."
    )
    memory: tuple[float, float] = free(
        (0.7, 0.85),
        description="Shares of the memory in use above which activations are kept in part "
        "(selective, where that spares any) and hardly at all (full).",
    )
    rollbacks: int = free(
        12, ge=0, description="How often a run may go back; with 0 not at its end either."
    )
    skipped_share: float = free(
        0.25, ge=0, lt=1, description="Largest share of 256 steps that may be left out."
    )
    may_stop: bool = free(True, description="Whether the run may be ended early.")

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
    """Copies of the whole state in memory, to go back to."""

    every_steps: int = free(50, gt=0, description="Steps between snapshots.")
    max_gib: float | None = free(
        None,
        ge=0,
        description="GiB that snapshots may take on each process; a fifth of what is free when "
        "unset.",
    )
    in_checkpoints: bool = free(
        True,
        description="Whether checkpoints hold the snapshots too, so that a resumed run can go back "
        "to before its start; each takes as much of the disk as a checkpoint without, once.",
    )


class OrchestratorConfig(Section):
    """Watching the run while it trains, and steering it."""

    mode: Annotated[Mode, off_means("off")] = free(
        "advise",
        description="advise: detectors watch every step, tell of what goes wrong and keep it in "
        "events.jsonl, and change nothing; act: what goes wrong is dealt with, and each decision "
        "is in decisions.jsonl; off: nobody watches.",
    )
    rules: RulesConfig = Field(RulesConfig(), description="Which rules may act.")
    limits: LimitsConfig = Field(LimitsConfig(), description="What they may do at most.")
    snapshots: SnapshotsConfig = Field(SnapshotsConfig(), description="What to go back to.")

    audit: bool = free(
        False,
        description="Audit the decisions whose states were kept once the run has ended: replay "
        "with and without each of them.",
    )
    kept_states: int = free(
        2,
        ge=0,
        description="Decisions, the newest, whose state is kept on disk for an audit; each takes "
        "as much as one checkpoint, or two where the run went back, and the averaged weights.",
    )
