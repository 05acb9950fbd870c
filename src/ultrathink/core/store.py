"""A key-value store that the processes of a run share, on any thread, apart from collectives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol


class SharedStore(Protocol):
    """A store that every process can write to and read from, on any thread.

    Values are plain JSON. Each key is written once, by one process.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def put(self, key: str, value: Any) -> None:
        """Write ``value`` under ``key``."""

    def wait_for(self, keys: Sequence[str], check: Callable[[], None]) -> list[Any]:
        """The values of all ``keys``, once they exist; calls ``check`` while it waits."""

    def forget(self, keys: Sequence[str]) -> None:
        """Remove keys that no process will read again."""


class LocalStore:
    """The store of a run of one process."""

    rank = 0
    size = 1

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}

    def put(self, key: str, value: Any) -> None:
        self._values[key] = value

    def wait_for(self, keys: Sequence[str], check: Callable[[], None]) -> list[Any]:
        return [self._values[key] for key in keys]

    def forget(self, keys: Sequence[str]) -> None:
        for key in keys:
            del self._values[key]


class PrefixStore:
    """The same store with ``prefix`` before each key, as in ``torch.distributed.PrefixStore``."""

    def __init__(self, store: SharedStore, prefix: str) -> None:
        self.rank, self.size = store.rank, store.size
        self._store, self._prefix = store, prefix

    def put(self, key: str, value: Any) -> None:
        self._store.put(self._full(key), value)

    def wait_for(self, keys: Sequence[str], check: Callable[[], None]) -> list[Any]:
        return self._store.wait_for([self._full(key) for key in keys], check)

    def forget(self, keys: Sequence[str]) -> None:
        self._store.forget([self._full(key) for key in keys])

    def _full(self, key: str) -> str:
        return f"{self._prefix}/{key}"
