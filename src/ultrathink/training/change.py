"""The base class of changes to a running training, and the checks of their values.

A change checks its values when it is created. ``apply`` runs at a step boundary and returns the
setting before and after, or None if nothing is to be recorded.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from ultrathink.core.errors import UltrathinkError
from ultrathink.training.snapshots import Snapshot

if TYPE_CHECKING:
    from ultrathink.training.parts import Parts

Effect = tuple[Any, Any]  # a setting before and after


@dataclass(frozen=True)
class Change(ABC):
    """A change to a run, applied at a step boundary."""

    kinds: ClassVar[dict[str, type[Change]]] = {}  # every change, by its name
    name: ClassVar[str]
    is_felt: ClassVar[bool] = True  # it affects what is learned

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):
            cls.kinds[cls.name] = cls

    @property
    def setting(self) -> str:
        """The name of the changed setting in records."""
        return self.name

    @property
    def needed(self) -> tuple[Snapshot, ...]:
        """The snapshots that the change needs."""
        return ()

    @abstractmethod
    def apply(self, run: Parts) -> Effect | None:
        """Apply the change; returns the setting before and after."""

    def as_applied(self, after: Any) -> Change:
        """The change that repeats this one exactly; ``after`` is what ``apply`` returned."""
        return self

    def to_json(self) -> dict[str, Any]:
        """The change as a JSON object, which ``change_from`` reads."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return {"change": self.name, **values}

    def __post_init__(self) -> None:
        for one in fields(self):
            value, check = getattr(self, one.name), one.metadata.get("check")
            if check is not None and not (value is None and one.metadata["may_be_none"]):
                is_right, must = check
                if not is_right(value):
                    self.refuse(one.name, must)

    def refuse(self, field: str, must: str) -> None:
        """Raise UltrathinkError for the value of ``field``; ``must`` says what is valid."""
        raise UltrathinkError(
            f"{type(self).__name__}: {field} {must}, not {getattr(self, field)!r}."
        )


def is_number(value: object) -> bool:
    """Whether ``value`` is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


POSITIVE = (lambda value: is_number(value) and value > 0, "must be a number above 0")
COUNT = (_is_count, "must be a whole number above 0")
NOT_NEGATIVE = (lambda value: is_number(value) and value >= 0, "must be a number of 0 or above")


def checked(check: tuple[Callable[[Any], bool], str], *, may_be_none: bool = False) -> Any:
    """A required field whose value is checked when the change is created."""
    return field(metadata={"check": check, "may_be_none": may_be_none})
