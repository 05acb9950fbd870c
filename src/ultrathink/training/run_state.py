"""The state of a run: named parts, each with its state and its behaviour in a rollback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from ultrathink.core.errors import CheckpointError
from ultrathink.core.protocols import State, Stateful
from ultrathink.training.host_states import copied_to_host

Load = Callable[[Any], None]


class _Entry(NamedTuple):
    state_dict: Callable[[], Any]
    load_state_dict: Load
    roll_back: Load


class RunState:
    """A registry of everything that belongs to a run's state.

    The state of a part that is missing (a guard that is set later, a callback that this start
    lacks) is kept, and saved again.
    """

    def __init__(self) -> None:
        self._parts: dict[str, _Entry] = {}
        self._required: set[str] = set()
        self._absent: dict[str, Any] = {}

    def register(
        self,
        name: str,
        state_dict: Callable[[], Any],
        load_state_dict: Load,
        *,
        roll_back: Load | None = None,
        is_required: bool = False,
    ) -> None:
        """Register a part under ``name``; a state that was kept for it is loaded now.

        ``roll_back(state)`` returns to an earlier state of this process; by default it is
        ``load_state_dict``. A state without a required part is refused.
        """
        self._parts[name] = _Entry(state_dict, load_state_dict, roll_back or load_state_dict)
        if is_required:
            self._required.add(name)
        if name in self._absent:
            load_state_dict(self._absent.pop(name))

    def register_one_of(self, kind: str, part: Stateful) -> None:
        """Register one of several parts by its class, the second of a class with a number.

        If it has a method ``roll_back(state)``, a rollback calls that.
        """
        name = first = f"{kind}.{type(part).__name__}"
        number = 1
        while name in self._parts:
            number += 1
            name = f"{first}.{number}"
        roll_back = getattr(part, "roll_back", None)
        self.register(name, part.state_dict, part.load_state_dict, roll_back=roll_back)

    def state_dict(self) -> State:
        """All states by the names of their parts."""
        return {**self._absent, **{name: part.state_dict() for name, part in self._parts.items()}}

    def copy(self) -> State:
        """A copy of the state in host memory, made at once."""
        state: State = copied_to_host(self.state_dict())
        return state

    def load_state_dict(self, state: State) -> None:
        """Continue from what ``state_dict`` returned, here or in another process."""
        missing = sorted(self._required - state.keys())
        if missing:
            raise CheckpointError(
                f"the checkpoint has no {missing[0]!r}: it is not that of a run, or was written by "
                f"another version of ultrathink; start a new run with its weights: "
                f"training.init_from=RUN."
            )
        self._absent = {name: one for name, one in state.items() if one and name not in self._parts}
        for name, part in self._parts.items():
            if name in state:
                part.load_state_dict(state[name])

    def roll_back(self, state: State) -> None:
        """Return to an earlier state of this process; each part decides what that means."""
        for name, part in self._parts.items():
            if name in state:
                part.roll_back(state[name])


@dataclass
class Progress:
    """The progress of a run."""

    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    num_skipped: int = 0
    best: float | None = None  # the best validation figure so far
    last_validation: int = 0  # step
    last_checkpoint: int = 0  # step
    last_checkpoint_s: float = 0.0  # elapsed time
    is_over: bool = False  # finished at this step, even if some of its length is left

    def is_due(self, every_steps: int | None) -> bool:
        """Whether this step is a multiple of ``every_steps``; None is never due."""
        return every_steps is not None and self.step % every_steps == 0

    def state_dict(self) -> State:
        return asdict(self)

    def load_state_dict(self, state: State) -> None:
        for name, value in state.items():
            setattr(self, name, value)
