"""The values of a run's configuration that are not the defaults, and where they came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import PydanticUndefined, to_jsonable_python

from ultrathink.config.reflection import field_at
from ultrathink.config.root import DEFAULT
from ultrathink.config.schema import Config

_NOT_SET_BY_ANYBODY = (DEFAULT, "derived", "chosen at run time")
_LONGEST_ORIGIN = 40
NONE = "none"  # stands for a value without a default


@dataclass(frozen=True)
class Setting:
    """A value that was set, and its default (``NONE`` if it has none)."""

    key: str
    value: Any
    default: Any
    origin: str


def changed_settings(tree: Mapping[str, Any], origins: Mapping[str, str] | None) -> list[Setting]:
    """The values that were set and differ from their defaults; a list is one value.

    Without ``origins`` this includes values that were derived or chosen at run time.
    """
    found = []
    for key, value in _leaves(tree):
        origin = "" if origins is None else _origin(key, origins)
        if origin.startswith(_NOT_SET_BY_ANYBODY):
            continue
        default = _default(key, tree)
        # A duration is text by default and may be a number in a file.
        if default != value and str(default) != str(value):
            found.append(Setting(key, value, default, origin))
    return found


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def _origin(key: str, origins: Mapping[str, str]) -> str:
    """The origin of a value, of the part that it belongs to, or of a value in it."""
    parts = key.split(".")
    places = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    places += [other for other in origins if other.startswith(f"{key}.")]
    origin = next((origins[place] for place in places if place in origins), DEFAULT)
    if origin.startswith("override "):  # whose text repeats the value
        return "override"
    return origin if len(origin) <= _LONGEST_ORIGIN else f"{origin[: _LONGEST_ORIGIN - 1]}…"


def _default(key: str, tree: Mapping[str, Any]) -> Any:
    """The default of a value as plain data; ``NONE`` where it has none."""
    path = key.split(".")
    is_type = path[-1] == "type"  # of a registered part
    try:
        found = field_at(Config, path[:-1] if is_type else path, tree)
    except (KeyError, TypeError, AttributeError):  # the part of a plugin that is not loaded
        return NONE
    default = PydanticUndefined if found is None else found[1].default
    if is_type:
        return getattr(default, "type", NONE)
    return NONE if default is PydanticUndefined else to_jsonable_python(default, fallback=str)
