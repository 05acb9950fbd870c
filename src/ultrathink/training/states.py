"""States of a run's parts: gathered and put back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ultrathink.core.protocols import State, Stateful


def states_of(parts: Sequence[Stateful]) -> State:
    """The state of each part, by its place and class."""
    return {
        f"{number}:{type(part).__name__}": part.state_dict() for number, part in enumerate(parts)
    }


def load_states(parts: Sequence[Stateful], states: dict[str, Any]) -> None:
    """Give each part its state back, where there is one: the first of a class that of the first.

    So a part keeps its state where others, that a user brings, are not there any more.
    """
    left: dict[str, list[Any]] = {}
    for name in sorted(states, key=lambda name: int(name.partition(":")[0])):
        left.setdefault(name.partition(":")[2], []).append(states[name])
    for part in parts:
        if waiting := left.get(type(part).__name__):
            part.load_state_dict(waiting.pop(0))
