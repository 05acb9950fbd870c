"""The values of a preset or file, and the overrides of the command line on top of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ultrathink.config.yaml_format import parse_yaml
from ultrathink.core.errors import ConfigError

OVERRIDE = "override"


def parse_override(text: str) -> tuple[str, Any]:
    """Split ``dotted.key=value`` and read the value as YAML."""
    key, equals, raw = text.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise ConfigError(
            f"{text!r} is not an override; write dotted.key=value, "
            f"for example training.max_steps=100."
        )
    try:
        return key, parse_yaml(raw)
    except ValueError as error:
        raise ConfigError(f"the value of {text!r} is not valid YAML: {error}.") from None


class Draft:
    """A configuration in the making: nested values, and the origin of each dotted key."""

    def __init__(self, tree: dict[str, Any], origins: Mapping[str, str]) -> None:
        self.tree = tree
        self.origins = dict(origins)
        # Not read from origins: a run folder's own origins name the overrides it was made with.
        self._overridden: set[str] = set()

    def override(self, text: str) -> None:
        """Apply one ``dotted.key=value``; a mapping changes the keys it names, no others."""
        key, value = parse_override(text)
        self._set(key.split("."), value, text)

    def drop_replaced(self, section: str, alternatives: Sequence[str], *dependent: str) -> None:
        """Let one of ``alternatives`` that is overridden replace another that was given before.

        Only one of them may be set; ``dependent`` keys of ``section`` follow from it.
        """
        values = self.tree.get(section)
        if not isinstance(values, dict):
            return
        given = [name for name in alternatives if values.get(name) is not None]
        if any(f"{section}.{name}" in self._overridden for name in given):
            for name in (*given, *dependent):
                if f"{section}.{name}" not in self._overridden:
                    values.pop(name, None)
                    self._forget(f"{section}.{name}")

    def is_overridden(self, key: str) -> bool:
        """Whether an override set ``key`` or something inside it."""
        return any(f"{known}.".startswith(f"{key}.") for known in self._overridden)

    def is_replaced(self, key: str) -> bool:
        """Whether an override set all of the list ``key``, or what an item is or where it lies."""
        parts = re.compile(rf"{re.escape(key)}(\.\d+(\.(type|path))?)?$")
        return any(parts.match(known) for known in self._overridden)

    def set_open(self, key: str) -> None:
        """Leave ``key`` to its default, as if nothing had chosen it."""
        *path, leaf = key.split(".")
        node: Any = self.tree
        for part in path:
            node = node[part]
        node.pop(leaf, None)
        self._forget(key)

    def _set(self, path: list[str], value: Any, text: str) -> None:
        node = self._parent(path, text)
        leaf, key = path[-1], ".".join(path)
        place: Any = leaf
        if isinstance(node, list):
            place = _list_index(node, leaf, key, text)
        if isinstance(value, dict) and value and not isinstance(_get(node, place), list):
            for inner, inner_value in value.items():
                self._set([*path, inner], inner_value, text)
            return
        if leaf == "type" and isinstance(node, dict) and node.get("type") not in (None, value):
            self._start_over(node, ".".join(path[:-1]))
        node[place] = value
        self._forget(key)
        keys = flatten(value, key)
        self.origins.update(dict.fromkeys(keys, f"{OVERRIDE} {text}"))
        self._overridden.update(keys)

    def _parent(self, path: list[str], text: str) -> dict[str, Any] | list[Any]:
        """The mapping or list that holds the last of ``path``, made where it does not exist."""
        node: Any = self.tree
        for depth, part in enumerate(path[:-1], start=1):
            here = ".".join(path[:depth])
            place: Any = part
            if isinstance(node, list):
                place = _list_index(node, part, here, text)
            child = _get(node, place)
            if child is None:
                child = node[place] = {}
                self._forget(here)
            elif isinstance(child, str) and path[depth].isdecimal():  # `train: books/`
                child = node[place] = [child]
            elif isinstance(child, str):  # the short form `optimizer: muon`
                child = node[place] = {"type": child}
                if here in self.origins:
                    self.origins[f"{here}.type"] = self.origins.pop(here)
            elif not isinstance(child, dict | list):
                raise ConfigError(f"override {text!r}: {here} is {child!r} and has no keys.")
            node = child
        assert isinstance(node, dict | list)
        return node

    def _start_over(self, node: dict[str, Any], key: str) -> None:
        """Empty a part whose type changes, but for what was overridden before."""
        for name in list(node):
            if f"{key}.{name}" not in self._overridden:
                del node[name]
                self._forget(f"{key}.{name}")

    def _forget(self, key: str) -> None:
        inside = f"{key}."
        for known in [known for known in self.origins if f"{known}.".startswith(inside)]:
            del self.origins[known]
            self._overridden.discard(known)


def _get(node: dict[str, Any] | list[Any], place: Any) -> Any:
    return node.get(place) if isinstance(node, dict) else node[place]


def _list_index(node: list[Any], part: str, path: str, text: str) -> int:
    if not part.isdecimal() or int(part) >= len(node):
        raise ConfigError(
            f"override {text!r}: {path} names item {part!r} of a list of {len(node)}, counted "
            f"from 0. To add an item, set the whole list: {path.rpartition('.')[0]}=[...]."
        )
    return int(part)


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings and lists by dotted key; empty ones are leaves."""
    items: list[tuple[str, Any]]
    if isinstance(tree, Mapping):
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list) and any(isinstance(item, Mapping) for item in tree):
        items = [(str(index), value) for index, value in enumerate(tree)]
    else:
        return {prefix: tree}
    if not items:
        return {prefix: tree}
    leaves: dict[str, Any] = {}
    for name, value in items:
        leaves.update(flatten(value, f"{prefix}.{name}" if prefix else name))
    return leaves
