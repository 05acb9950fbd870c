"""The records that a run sends to its sinks, and the interface of a sink."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, SupportsFloat, TypeAlias, TypeGuard

if TYPE_CHECKING:  # it needs NumPy, which takes a while to import
    from ultrathink.monitoring.experts import ExpertRecord

Split = Literal["train", "val", "eval"]
Level = Literal["info", "warning"]
Note: TypeAlias = tuple[str, Level]  # a message, and how much it matters
Reporter: TypeAlias = Callable[[str, Level], None]  # shows a message to the user
JsonScalar: TypeAlias = str | int | float | None
RESERVED = ("step", "split", "time")


@dataclass(frozen=True)
class MetricRecord:
    """The figures of one step: ``step`` counts from 1, ``time`` is in unix seconds."""

    step: int
    split: Split
    time: float
    values: dict[str, float | int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        clash = [name for name in RESERVED if name in self.values]
        assert not clash, f"{clash[0]!r} belongs to the record itself and cannot be a metric"

    def to_json(self) -> dict[str, JsonScalar]:
        """One flat mapping of strict JSON values; what is not finite becomes null."""
        record: dict[str, JsonScalar] = {"step": self.step, "split": self.split, "time": self.time}
        record.update({name: _plain(value) for name, value in self.values.items()})
        return record

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> MetricRecord | None:
        """The record of a line that ``to_json`` returned, with NaN for null.

        None for another object; values that are no numbers are left out.
        """
        step, split, at = (record.get(name) for name in RESERVED)
        if split not in ("train", "val", "eval") or not _is_number(step) or not _is_number(at):
            return None
        figures = {
            name: math.nan if figure is None else figure
            for name, figure in record.items()
            if name not in RESERVED and (figure is None or _is_number(figure))
        }
        return cls(int(step), split, float(at), figures)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plain(value: SupportsFloat) -> JsonScalar:
    if isinstance(value, Integral):
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else None


@dataclass(frozen=True)
class RunInfo:
    """The facts that a sink gets before the first step; ``total_steps`` is 0 while unknown."""

    name: str
    folder: Path
    total_steps: int
    start_step: int  # the last completed step; 0 for a new run
    heading: str  # the run in a line or two: model size, device, length


class Sink:
    """Shows or stores the figures of a run; this base class does nothing.

    A method may raise: that is reported, training continues, and the sink is still called, even
    after ``open`` failed.
    """

    def open(self, info: RunInfo) -> None:
        """Start, and discard what an earlier process wrote after ``info.start_step``."""

    def set_total_steps(self, total_steps: int) -> None:
        """Set the length of a run that was known only after the first steps were timed."""

    def progress(self, step: int) -> None:
        """Note a finished step; must be cheap."""

    def write(self, record: MetricRecord) -> None:
        """Write the figures of a logged step or of a validation."""

    def experts(self, record: ExpertRecord) -> None:
        """Write the expert statistics of a logged step."""

    def message(self, text: str, level: Level) -> None:
        """Show a message."""

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Write a text that the model wrote; ``text`` follows ``prompt``."""

    def phase(self, name: str) -> None:
        """Note that training entered a phase, such as CONVERGING."""

    def decision(self, step: int, title: str, text: str) -> None:
        """Write a decision of the orchestrator: a short ``title``, and ``text`` with its reason."""

    def take_notes(self) -> list[Note]:
        """Messages about the sink itself since the last call; called after every other method."""
        return []

    def close(self) -> None:
        """Finish; called once, also after an error."""
