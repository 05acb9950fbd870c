"""How a run may end, and what that means for a resume."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Ending:
    """Why a run ended; two of one name are equal, whatever led to them.

    Endings are made wherever a run is ended: what depends on one asks ``can_resume``, not its name.
    """

    name: str  # in results, logs and messages
    can_resume: bool  # a resume trains on; else the run is over, unless it is given more length
    reason: str = field(default="", compare=False)  # what led to it, in a few words

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})" if self.reason else self.name


FINISHED = Ending("finished", can_resume=False)
OUT_OF_TIME = Ending("out of time", can_resume=False, reason="training.max_minutes are used up")
STOPPED = Ending("stopped", can_resume=True)


def returned_to(step: int) -> Ending:
    """The end of a run that went back to ``step``, where it was best."""
    return Ending(f"returned to step {step}", can_resume=False)
