"""The ways a run may end, and whether it can be resumed."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Ending:
    """Why a run ended; endings of the same name are equal.

    Code that depends on an ending asks for ``can_resume``, not for the name.
    """

    name: str  # in results, logs and messages
    can_resume: bool  # False: the run is finished, unless it is extended
    reason: str = field(default="", compare=False)  # a few words

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})" if self.reason else self.name


FINISHED = Ending("finished", can_resume=False)
OUT_OF_TIME = Ending("out of time", can_resume=False, reason="training.max_minutes are used up")
STOPPED = Ending("stopped", can_resume=True)


def returned_to(step: int) -> Ending:
    """The ending of a run that rolled back to ``step``, its best."""
    return Ending(f"returned to step {step}", can_resume=False)
