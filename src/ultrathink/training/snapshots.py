"""Snapshots of a run in memory, and the handles that keep them."""

from __future__ import annotations

from dataclasses import dataclass, field

from ultrathink.core.protocols import State
from ultrathink.training.host_states import HostStates


@dataclass(frozen=True)
class Snapshot:
    """Stands for a run's whole state in memory, as long as anybody holds it.

    Each process keeps its own part of the state under ``key``; a later one has a higher key.
    """

    step: int
    key: int


@dataclass
class Snapshots:
    """The states behind handles, by their keys."""

    states: HostStates = field(default_factory=HostStates)
    carried: set[int] = field(default_factory=set)  # keys of those that checkpoints hold too

    def take(self, key: int, state: State, *, in_checkpoints: bool) -> None:
        """Copy ``state`` to the memory of the host, while training goes on where there is a GPU."""
        self.states.take(key, state)
        if in_checkpoints:
            self.carried.add(key)

    def keep(self, key: int, state: State, *, in_checkpoints: bool) -> None:
        """Hold ``state``, which nobody changes any more."""
        self.states[key] = state
        if in_checkpoints:
            self.carried.add(key)

    def forget(self, key: int) -> None:
        """Nobody can ask for it any more."""
        self.states.pop(key, None)
        self.carried.discard(key)
