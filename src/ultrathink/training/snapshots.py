"""Handles of a run's snapshots, whose states are in ``host_states``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Snapshot:
    """A handle of a run's whole state in memory, which lives as long as the handle.

    Each process keeps its part of the state under ``key``; later snapshots have higher keys.
    """

    step: int
    key: int
