"""Declaring an option, and with it what resuming a run with another value does.

``fixed``: refused. ``felt``: applied, recorded and reported as a change that affects training.
``free``: applied silently, since the updates stay the same up to rounding. ``place``: as ``free``,
for what names a run or says where files lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from pydantic import Field
from pydantic.annotated_handlers import GetJsonSchemaHandler
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema

Rule = Literal["fixed", "felt", "free"]
Effect = Literal["length", "steps", "samples", "scores", "place"]
"""What a value decides: the length of the run, the number of steps of a length in other units,
which samples are trained on, what scores are comparable with, or where files lie."""


@dataclass(frozen=True)
class OnResume:
    """What resuming with another value of an option does."""

    rule: Rule
    because: str = ""  # it is fixed
    decides: frozenset[Effect] = frozenset()
    rests_on: tuple[str, ...] = ()  # keys that a choice made at run time depends on
    is_compared: bool = True  # or the run writes it itself, or may be moved

    @property
    def is_place(self) -> bool:
        """Whether the value names a run or says where files lie."""
        return "place" in self.decides

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {**handler(schema), "x-resume": self.rule}


def _option(
    rule: Rule,
    default: Any = ...,
    *,
    because: str = "",
    decides: tuple[Effect, ...] = (),
    rests_on: tuple[str, ...] = (),
    is_compared: bool = True,
    **options: Any,
) -> Any:
    field = Field(default, **options)
    field.metadata.append(OnResume(rule, because, frozenset(decides), rests_on, is_compared))
    return field


fixed = partial(_option, "fixed")  # with `because`
felt = partial(_option, "felt")
free = partial(_option, "free")
place = partial(free, decides=("place",), is_compared=False)


def on_resume(field: FieldInfo) -> OnResume | None:
    """The rule that a field was declared with; None for a section, and for a user's own part."""
    return next((marker for marker in field.metadata if isinstance(marker, OnResume)), None)
