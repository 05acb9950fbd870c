"""Snapshots embedded in a checkpoint, so that a resumed run can roll back to before its start.

Each is a folder below ``snapshots`` in the format of a checkpoint, with its own checksums: if one
is damaged, only that snapshot is lost. Snapshots never change, so one that an earlier checkpoint
holds is hard-linked into the new one and takes no further space.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultrathink.checkpoint.format import (
    CHECKSUM_FILE,
    Check,
    DamagedCheckpointError,
    has_its_sizes,
    save_checkpoint,
    verify_checkpoint,
)
from ultrathink.core.files import clean_up, sync_folder
from ultrathink.core.protocols import State
from ultrathink.core.store import PrefixStore, SharedStore

SNAPSHOTS = "snapshots"  # the folder in a checkpoint, and the list of their steps in its state
_TO_WRITE = "snapshots to write"  # key in the shared store


@dataclass(frozen=True)
class EmbeddedSnapshot:
    """A snapshot to write into a checkpoint; ``key`` identifies it within this process."""

    key: int
    step: int
    state: State  # never modified


def snapshot_path(checkpoint: Path, step: int) -> Path:
    """The folder of the snapshot of ``step`` in a checkpoint."""
    return checkpoint / SNAPSHOTS / f"step_{step:08d}"


def embedded_steps(state: Mapping[str, Any]) -> list[int]:
    """The steps of the snapshots embedded in a checkpoint with this state."""
    return [int(step) for step in state.get(SNAPSHOTS, ())]


def problems_of_snapshots(checkpoint: Path, state: Mapping[str, Any]) -> dict[int, str]:
    """The problem of each damaged or missing snapshot, by step."""
    problems = {}
    for step in embedded_steps(state):
        try:
            verify_checkpoint(snapshot_path(checkpoint, step))
        except DamagedCheckpointError as error:
            is_there = error.folder.is_dir()
            problems[step] = error.problem if is_there else "it is missing"
    return problems


class SnapshotWriter:
    """Writes snapshots into new checkpoints below ``checkpoints``."""

    def __init__(self, checkpoints: Path) -> None:
        self._checkpoints = checkpoints
        # Of each on the disk, by key: after a rollback two snapshots may have the same step.
        self._checksums: dict[int, bytes] = {}

    def note(self, key: int, folder: Path) -> None:
        """Record that ``folder`` holds the snapshot ``key``."""
        self._checksums[key] = (folder / CHECKSUM_FILE).read_bytes()

    def write(
        self, embedded: Sequence[EmbeddedSnapshot], beside: Path, check: Check, store: SharedStore
    ) -> None:
        """Add ``embedded`` to the unfinished checkpoint ``beside``; every process calls it."""
        if not embedded:
            return
        if store.rank == 0:
            to_write: list[int] = []
            try:
                keys = {one.key for one in embedded}
                self._checksums = {key: s for key, s in self._checksums.items() if key in keys}
                to_write = [one.key for one in embedded if not self._link(one, beside, check)]
            finally:
                store.put(_TO_WRITE, to_write)
        else:
            [to_write] = store.wait_for([_TO_WRITE], check)
        for one in embedded:
            if one.key in to_write:
                target = snapshot_path(beside, one.step)
                save_checkpoint(target, one.state, check, PrefixStore(store, target.name))
                if store.rank == 0:
                    self.note(one.key, target)

    def _link(self, one: EmbeddedSnapshot, beside: Path, check: Check) -> bool:
        """Hard-link the files from an earlier checkpoint; returns whether that succeeded."""
        sums = self._checksums.get(one.key)
        if sums is None:
            return False
        check()
        target = snapshot_path(beside, one.step)
        for folder in sorted(self._checkpoints.glob("step_*"), reverse=True):
            source = snapshot_path(folder, one.step)
            if not _holds(source, sums):
                continue
            try:
                target.mkdir(parents=True)
                for file in source.iterdir():
                    os.link(file, target / file.name)
                sync_folder(target)
                sync_folder(target.parent)
            except OSError:  # a file system without hard links
                clean_up(target)
                return False
            return True
        return False


def _holds(folder: Path, sums: bytes) -> bool:
    """Whether ``folder`` has these checksums and files of the recorded sizes."""
    try:
        return (folder / CHECKSUM_FILE).read_bytes() == sums and has_its_sizes(folder)
    except OSError:
        return False
