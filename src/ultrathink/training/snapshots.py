"""The handles of a run's snapshots; their states are in ``host_states``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Snapshot:
    """Stands for a run's whole state in memory, as long as anybody holds it.

    Each process keeps its own part of the state under ``key``; a later one has a higher key.
    """

    step: int
    key: int
