"""Errors caused by users; each message names the field, the value and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UltrathinkError(ValueError):
    """An error that the user can fix; the command line prints it without a stack trace."""


class ConfigError(UltrathinkError):
    """A configuration that cannot be used."""


class DataError(UltrathinkError):
    """Training or validation text that is missing, unreadable or empty."""


class CheckpointError(UltrathinkError):
    """A checkpoint or run folder that is missing, damaged or made for something else."""


class OutOfMemoryError(UltrathinkError):
    """The training does not fit into memory; the message says what to change."""


class MissingDependencyError(UltrathinkError):
    """An optional package is missing; the message names the extra that installs it."""


def closest(name: str, candidates: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The candidate most similar to ``name``, or None if none is similar."""
    matches = difflib.get_close_matches(name, list(candidates), n=1, cutoff=cutoff)
    return matches[0] if matches else None


def suggestion(name: str, candidates: Iterable[str]) -> str:
    """A last sentence for a message: the nearest candidate, or all of them."""
    known = sorted(set(candidates))
    # Stricter than for keys: gelu is not a misspelt relu2. But bep is bpe with letters swapped.
    swapped = next((other for other in known if sorted(other) == sorted(name)), None)
    match = swapped or closest(name, known, cutoff=0.7)
    if match is not None:
        return f"Did you mean {match!r}?"
    return f"Known: {', '.join(known)}."
