"""The root of a configuration: every option of one kind of job, and the origin of each value.

A kind of job is one class that names its sections.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import PrivateAttr

from ultrathink.config.base import Section
from ultrathink.config.overrides import Draft

DEFAULT = "default"


class Root(Section):
    """Every option of a job; loading, overrides, messages and documentation work for any root."""

    presets: ClassVar[str | None] = None
    """The folder of this package that holds the presets of the job."""
    default_preset: ClassVar[str | None] = None
    """The preset that holds where no source is named; the defaults alone when None."""

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    @classmethod
    def prepare(cls, draft: Draft) -> None:
        """Adapt the given values before they are checked, where one value replaces another."""

    def derived(self, name: str) -> Self:
        """This configuration with what follows from other values; ``name`` is the source's."""
        return self

    def __eq__(self, other: object) -> bool:
        """Equal values are equal configurations, wherever they came from."""
        if type(other) is not type(self):
            return NotImplemented
        return self.model_dump() == other.model_dump()

    def origin(self, key: str) -> str:
        """Where the value of a dotted key came from; "default" when nothing set it."""
        while key:
            if key in self._origins:
                return self._origins[key]
            key = key.rpartition(".")[0]
        return DEFAULT

    @property
    def origins(self) -> dict[str, str]:
        """Every recorded origin, by dotted key."""
        return dict(self._origins)

    def with_origins(self, origins: Mapping[str, str]) -> Self:
        """The same values, with ``origins`` as their record."""
        copy = self.model_copy()
        copy._origins = dict(origins)
        return copy

    def replace(self, values: Mapping[str, Any], *, origin: str) -> Self:
        """A checked copy with the dotted keys of ``values`` set, each recorded as ``origin``."""
        tree = self.model_dump(mode="json")
        for key, value in values.items():
            *parents, leaf = key.split(".")
            node = tree
            for parent in parents:
                node = node[parent]
            node[leaf] = value
        changed = type(self).model_validate(tree)
        return changed.with_origins({**self._origins, **dict.fromkeys(values, origin)})
