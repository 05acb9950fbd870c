"""Processes that do one thing together beside training, and what they tell each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol


class Team(Protocol):
    """A board that every process of a team can write to and read from, on any thread.

    Values are what JSON knows. A key is written once, by one process.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def put(self, key: str, value: Any) -> None:
        """Write ``value`` under ``key``."""

    def wait_for(self, keys: Sequence[str], check: Callable[[], None]) -> list[Any]:
        """The values of all ``keys`` once they are there; ``check`` is called meanwhile."""

    def forget(self, keys: Sequence[str]) -> None:
        """Remove what nobody will ask for any more."""


class Alone:
    """The team of a run of one process."""

    rank = 0
    size = 1

    def __init__(self) -> None:
        self._board: dict[str, Any] = {}

    def put(self, key: str, value: Any) -> None:
        self._board[key] = value

    def wait_for(self, keys: Sequence[str], check: Callable[[], None]) -> list[Any]:
        return [self._board[key] for key in keys]

    def forget(self, keys: Sequence[str]) -> None:
        for key in keys:
            del self._board[key]


class PartOfWork:
    """The same team in one part of what it does, ``name``, with keys of its own."""

    def __init__(self, team: Team, name: str) -> None:
        self.rank, self.size = team.rank, team.size
        self._team, self._name = team, name

    def put(self, key: str, value: Any) -> None:
        self._team.put(self._inside(key), value)

    def wait_for(self, keys: Sequence[str], check: Callable[[], None]) -> list[Any]:
        return self._team.wait_for([self._inside(key) for key in keys], check)

    def forget(self, keys: Sequence[str]) -> None:
        self._team.forget([self._inside(key) for key in keys])

    def _inside(self, key: str) -> str:
        return f"{self._name}/{key}"
