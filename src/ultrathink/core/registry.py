"""The registry of parts: YAML names a part, and its code is imported on first use."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

from ultrathink.core.errors import ConfigError, UltrathinkError, suggestion

Part = TypeVar("Part")
PLUGIN_GROUP = "ultrathink.plugins"
_loaded_entry_points = False


@dataclass(frozen=True)
class Entry(Generic[Part]):
    """A registered name: its code, or where to import it from, and the class of its options."""

    name: str
    target: Part | str  # "package.module:attribute" until first used
    options: type[Any] | None = None


class Registry(Generic[Part]):
    """Maps names to parts of one kind, and imports a part on first use.

    ``kind`` is the name of a part in messages ("optimizer"). A part is registered as the string
    ``"package.module:attribute"``, or as the object itself with the decorator ``register``.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry[Part]] = {}

    def add(self, name: str, target: Part | str, *, options: type[Any] | None = None) -> None:
        """Register ``target`` under ``name``, which must be new."""
        if name in self._entries:
            raise ConfigError(f"{self.kind} {name!r} is registered already; choose another name.")
        self._entries[name] = Entry(name, target, options)

    def register(self, name: str, *, options: type[Any] | None = None) -> Callable[[Part], Part]:
        """Decorator form of ``add``, for parts in a user's file."""

        def decorate(part: Part) -> Part:
            self.add(name, part, options=options)
            return part

        return decorate

    def entry(self, name: str) -> Entry[Part]:
        """The entry of ``name``; otherwise ConfigError suggests the nearest one."""
        if name not in self._entries:
            load_entry_points()
        if name not in self._entries:
            raise ConfigError(
                f"there is no {self.kind} called {name!r}. {suggestion(name, self._entries)} "
                f"To load your own parts use --plugin FILE.py."
            )
        return self._entries[name]

    def load(self, name: str) -> Part:
        """The part of ``name``, imported if necessary."""
        entry = self.entry(name)
        if not isinstance(entry.target, str):
            return entry.target
        module_name, _, attribute = entry.target.partition(":")
        part: Part = getattr(importlib.import_module(module_name), attribute)
        self._entries[name] = Entry(name, part, entry.options)
        return part

    def names(self) -> list[str]:
        return list(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[Entry[Part]]:
        return iter(self._entries.values())


def load_plugin(path: str | Path) -> None:
    """Run a user's Python file, so that a configuration can name the parts it registers."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"--plugin {path}: there is no such file.")
    module_name = f"ultrathink_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--plugin {path}: not a Python file; its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except UltrathinkError:
        raise
    except Exception as error:
        del sys.modules[module_name]
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"--plugin {path} failed: {reason}. (--debug shows where)") from error


def load_entry_points() -> None:
    """Import the plugins of installed packages, once."""
    global _loaded_entry_points
    if _loaded_entry_points:
        return
    _loaded_entry_points = True
    for point in entry_points(group=PLUGIN_GROUP):
        point.load()
