"""A training log: what it is, its signals from the beginning, and what has come since."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ultrathink.core.errors import DataError
from ultrathink.orchestrator.signals import Signals


class LogError(DataError):
    """A file that cannot be read as a training log; the message says why, and what to do."""


class NotYetError(LogError):
    """There is no log yet, but it may come: the file is missing, empty, or has only a preamble."""


@dataclass(frozen=True)
class LogSignals(Signals):
    """Signals of a log that may hold several runs; ``run`` is empty where it holds one."""

    run: str = ""


@dataclass(frozen=True)
class News:
    """What was appended to a log since it was last asked for.

    ``is_anew`` says that the file was cut or replaced: these are its signals from the beginning.
    """

    signals: Sequence[LogSignals] = ()
    is_anew: bool = False


@dataclass
class Log(ABC):
    """A training log that was recognized."""

    path: Path
    format: str  # in words
    total_steps: int | None = None  # that the run is to take, once the log has told
    notes: list[str] = field(default_factory=list)  # what could not be read, in sentences

    @abstractmethod
    def signals(self) -> Iterator[LogSignals]:
        """All signals from the beginning, in the order of the file; steps may go back."""

    @abstractmethod
    def poll(self) -> News:
        """What has come since the last call, or since the beginning; LogError where it is gone."""
