"""State declared in one place, so that writing and reading a checkpoint always agree."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from typing import Any, ClassVar, TypeVar

from ultrathink.core.protocols import State, Stateful

Kept = TypeVar("Kept", bound=Stateful)


class Remembers:
    """A base class whose state is the attributes listed in ``remembered``.

    They are numbers, texts, None, lists and dictionaries of those, or objects with ``state_dict``,
    also as values of an existing dictionary: an object without a saved state is unchanged, and the
    state of a missing object is kept. ``records`` gives the class of attributes that are
    dataclasses, single, in a list or as values of a dictionary.
    """

    remembered: ClassVar[tuple[str, ...]]
    records: ClassVar[Mapping[str, type]] = {}

    def state_dict(self) -> State:
        """The state to keep in checkpoints."""
        return {name.lstrip("_"): _saved(getattr(self, name)) for name in self.remembered}

    def load_state_dict(self, state: State) -> None:
        """Restore what ``state_dict`` returned."""
        for name in self.remembered:
            kept = state[name.lstrip("_")]
            setattr(self, name, _restored(getattr(self, name), kept, self.records.get(name)))


class PerName(dict[str, Kept]):
    """Objects with a state, created when their name is first used."""

    def __init__(self, make: Callable[[], Kept]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, name: str) -> Kept:
        made = self[name] = self._make()
        return made

    def state_dict(self) -> State:
        """The state to keep in checkpoints."""
        return {name: value.state_dict() for name, value in self.items()}

    def load_state_dict(self, state: State) -> None:
        """Restore what ``state_dict`` returned."""
        values: dict[str, Any] = dict(state)
        self.clear()
        for name, kept in values.items():
            self[name].load_state_dict(kept)


def _saved(value: Any) -> Any:
    if isinstance(value, Stateful):
        return value.state_dict()
    if isinstance(value, dict):
        return {name: _saved(kept) for name, kept in value.items()}
    if isinstance(value, list):
        return [_saved(one) for one in value]
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return copy.deepcopy(value)


def _restored(value: Any, kept: Any, record: type | None) -> Any:
    if isinstance(value, Stateful):
        value.load_state_dict(kept)
        return value
    if isinstance(value, dict):
        there = {name: one for name, one in value.items() if isinstance(one, Stateful)}
        found = {name: _restored(value.get(name), one, record) for name, one in kept.items()}
        return {**there, **found}
    if record is None or kept is None:
        return copy.deepcopy(kept)
    return [record(**one) for one in kept] if isinstance(value, list) else record(**kept)
