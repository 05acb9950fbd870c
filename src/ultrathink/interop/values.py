"""Reads a ``config.json`` of another program; errors name the field and the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ultrathink.core.errors import CheckpointError, ConfigError


class Values:
    """The values of a JSON object in ``path``; ``prefix`` comes before names in messages."""

    def __init__(self, values: Mapping[str, Any], path: Path, prefix: str = "") -> None:
        self.values = values
        self.path = path
        self.prefix = prefix

    def number(self, name: str, default: float | None = None) -> float:
        """A number; CheckpointError if it is absent and there is no ``default``."""
        value = self._given(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.unfit(name, "must be a number")
        return value

    def count(self, name: str, default: int | None = None) -> int:
        """A whole number above 0; CheckpointError if it is absent and there is no ``default``."""
        value = self._given(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.unfit(name, "must be a whole number above 0")
        return value

    def get(self, name: str, default: Any = None) -> Any:
        """The value of any type; ``default`` if it is absent or null."""
        value = self.values.get(name)
        return default if value is None else value

    def unfit(self, name: str, problem: str) -> CheckpointError:
        """The error for a value that cannot be used; ``problem`` ends the sentence."""
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
    """The error for a model that cannot be exported; ``remedy`` is a setting that can."""
    return ConfigError(
        f"{problem} To export a model, train it with {remedy}. ultrathink generate and load_model "
        f"read this run as it is."
    )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; CheckpointError if it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); copy or download it again."
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object; copy or download it again.")
    return content
