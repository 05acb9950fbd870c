"""Reading a ``config.json`` that others wrote, with messages that name field and file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ultrathink.core.errors import CheckpointError, ConfigError


class Values:
    """The values of a JSON object in ``path``; ``prefix`` begins the names in messages."""

    def __init__(self, values: Mapping[str, Any], path: Path, prefix: str = "") -> None:
        self.values = values
        self.path = path
        self.prefix = prefix

    def number(self, name: str, default: float | None = None) -> float:
        """A number; CheckpointError where there is none and no ``default``."""
        value = self._given(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.unfit(name, "must be a number")
        return value

    def count(self, name: str, default: int | None = None) -> int:
        """A whole number above 0; CheckpointError where there is none and no ``default``."""
        value = self._given(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.unfit(name, "must be a whole number above 0")
        return value

    def get(self, name: str, default: Any = None) -> Any:
        """Whatever stands there; ``default`` where nothing or null does."""
        value = self.values.get(name)
        return default if value is None else value

    def unfit(self, name: str, problem: str) -> CheckpointError:
        """The error for a value that cannot be used; ``problem`` goes on after it."""
        value = json.dumps(self.values.get(name))
        return CheckpointError(f"{self.path}: {self.prefix}{name} is {value}; {problem}.")

    def _given(self, name: str, default: Any) -> Any:
        value = self.get(name, default)
        if value is None:
            raise CheckpointError(
                f"{self.path} does not say {self.prefix}{name}; add it, or save the model again "
                f"with transformers."
            )
        return value


def cannot_export(problem: str, remedy: str) -> ConfigError:
    """The error for a model that has no form elsewhere; ``remedy`` is what to train it with."""
    return ConfigError(
        f"{problem} A model that is to be exported is trained with {remedy}. ultrathink generate "
        f"and load_model read this run as it is."
    )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; CheckpointError where it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); copy or download it again."
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object; copy or download it again.")
    return content
