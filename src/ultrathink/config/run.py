"""Section ``run``: what a run is called, where it is kept, and its seed."""

from __future__ import annotations

from ultrathink.config.base import Section
from ultrathink.config.options import fixed, place


class RunConfig(Section):
    """Name, place and seed of a run."""

    name: str | None = place(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run folder; derived from the preset or file when unset. A name in use gets a
    number: demo, demo-2."""
    dir: str = place("runs")
    """Folder in which run folders are made."""
    seed: int = fixed(0, because="it decides the order of the data", ge=0, lt=2**63)
    """Seed of the initial weights, the data order and dropout."""
