"""Interfaces that packages in different layers agree on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    # What a checkpoint can hold: nested lists and dicts of plain values and tensors.
    StateValue: TypeAlias = Tensor | dict[str, Any] | list[Any] | str | int | float | bool | None
    State: TypeAlias = dict[str, StateValue]
else:
    State = dict


@runtime_checkable
class Stateful(Protocol):
    """An object with a state, which every checkpoint contains."""

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State) -> None: ...
