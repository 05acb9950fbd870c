"""A training log: what it is, its signals from the beginning, and what was appended since."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ultrathink.core.errors import DataError
from ultrathink.orchestrator.signals import Signals

SAMPLE_ROWS = 400  # by which it is decided what a log is, and what its columns are
Row = Mapping[str, Any]  # a value for each name


class LogError(DataError):
    """A file that cannot be read as a training log; the message says why, and what to do."""


class NotYetError(LogError):
    """There is no log yet, but it may come: the file is missing, empty, or has only a preamble."""


@dataclass(frozen=True)
class LogSignals(Signals):
    """Signals of a log that may hold several runs.

    ``run`` is empty where it holds one, and of the first of several that have no names. ``undone``
    is the step beyond which a resume undid all steps before this record; None where none did.
    """

    run: str = ""
    undone: int | None = None


# What a line says: an empty row where that is nothing, None where it cannot be read.
Parse = Callable[[str], Row | LogSignals | None]


@dataclass(frozen=True)
class News:
    """What was appended to a log since the last call.

    ``is_replaced`` says that the file was cut or replaced: these are all signals of the file.
    """

    signals: Sequence[LogSignals] = ()
    is_replaced: bool = False


@dataclass
class Log(ABC):
    """A training log that was recognized."""

    path: Path
    format: str  # in words
    total_steps: int | None = None  # that the run is to take, once the log says so
    notes: list[str] = field(default_factory=list)  # what was not read, in sentences

    @abstractmethod
    def signals(self) -> Iterator[LogSignals]:
        """All signals from the beginning, in the order of the file; steps may go back."""

    @abstractmethod
    def poll(self) -> News:
        """What was appended since the last call; LogError or OSError where the file is gone."""
