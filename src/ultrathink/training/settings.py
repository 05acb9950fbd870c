"""The settings that may change during a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ultrathink.core.protocols import State


@dataclass
class LiveSettings:
    """The settings that may change during a run; part of every checkpoint."""

    lr_factor: float = 1.0
    lr_eases_from: int = 0  # from this step on the factor returns to 1 ...
    lr_eases_over: int | None = None  # ... over this many steps; None: it stays
    lr_scale: float = 1.0  # permanent
    lr_correction: float = 1.0  # corrects a rate that differs from the requested one
    optimizer_params: dict[str, Any] = field(default_factory=dict)  # name: configured, current
    weight_decay: float | None = None  # None: as configured
    clip: float | None = None
    micro_batch_size: int = 1
    # Set by a resume with another schedule or length, so that the rate never rises abruptly.
    schedule_start: int = 0  # the schedule starts after this step
    schedule_ceiling: float = 1.0  # largest factor of the schedule
    eval_every: int | None = None  # steps between validations
    activation_checkpointing: str = "none"

    def lr_factor_at(self, step: int) -> float:
        """The factor of the schedule's rate in ``step``; it returns to 1 geometrically."""
        if self.lr_eases_over is None:
            return self.lr_factor
        left = 1 - (step - self.lr_eases_from) / self.lr_eases_over
        return float(self.lr_factor ** min(1.0, max(0.0, left)))

    def state_dict(self) -> State:
        return asdict(self)

    def load_state_dict(self, state: State) -> None:
        for name, value in state.items():
            setattr(self, name, value)
