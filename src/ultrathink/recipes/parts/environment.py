"""The environment that the bits of a run depend on, as recorded at each start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ultrathink.runs.folder import RunFolder
from ultrathink.runs.manifest import code_and_packages, hardware
from ultrathink.runs.segments import read_segments
from ultrathink.training.choices import Choices

_BITS_DEPEND_ON = {
    "torch": ("packages", "torch"),
    "processor": ("hardware", "cpu"),
    "threads": ("hardware", "threads"),
    "device": ("device",),
    "processes": ("processes",),
}


def environment(choices: Choices) -> dict[str, Any]:
    """What bits depend on apart from the run folder, as recorded in each segment of a run."""
    return {
        **code_and_packages(),
        "hardware": hardware(),
        "device": str(choices.device),
        "precision": choices.precision,
        "processes": choices.world.size,
    }


def environment_changes(run: RunFolder, here: dict[str, Any]) -> list[str]:
    """A sentence if the environment changed, so that bits will differ."""
    segments = read_segments(run.segments)
    if not segments:
        return []
    differing = []
    for name, keys in _BITS_DEPEND_ON.items():
        before = {"processes": 1, **segments[-1].environment}  # old segments lack it
        then, now = (_inside(place, keys) for place in (before, here))
        if then != now:
            differing.append(f"{name} {then} -> {now}")
    if not differing:
        return []
    return [f"the run resumes, but not bit for bit as without the stop: {'; '.join(differing)}"]


def _inside(tree: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree
