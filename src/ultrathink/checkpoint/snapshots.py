"""The snapshots that a checkpoint carries, so that a resumed run can go back beyond its start.

Each is a folder below ``snapshots`` in the same form as a checkpoint, with checksums of its own:
one that is damaged is lost, and the checkpoint is not. They never change, so one that an earlier
checkpoint holds is given a second name in the new one (a hard link) and takes no space again.
"""

from __future__ import annotations

import os
import shutil
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
from ultrathink.core.files import sync_folder
from ultrathink.core.protocols import State
from ultrathink.core.store import PrefixStore, SharedStore

SNAPSHOTS = "snapshots"  # the folder in a checkpoint, and in its state the steps of what it holds
_TO_WRITE = "snapshots to write"  # key in the shared store


@dataclass(frozen=True)
class Carried:
    """A snapshot to write; ``key`` stands for it as long as the process lives."""

    key: int
    step: int
    state: State  # nobody changes it any more


def snapshot_path(checkpoint: Path, step: int) -> Path:
    """Where a checkpoint holds the snapshot of ``step``."""
    return checkpoint / SNAPSHOTS / f"step_{step:08d}"


def carried_steps(state: Mapping[str, Any]) -> list[int]:
    """The steps of the snapshots that a checkpoint with this state was written with."""
    return [int(step) for step in state.get(SNAPSHOTS, ())]


def problems_of_snapshots(checkpoint: Path, state: Mapping[str, Any]) -> dict[int, str]:
    """What is wrong with each snapshot that is not as it was written, by its step."""
    problems = {}
    for step in carried_steps(state):
        try:
            verify_checkpoint(snapshot_path(checkpoint, step))
        except DamagedCheckpointError as error:
            is_there = error.folder.is_dir()
            problems[step] = error.problem if is_there else "it is missing"
    return problems


class SnapshotWriter:
    """Writes snapshots into the coming checkpoints below ``checkpoints``."""

    def __init__(self, checkpoints: Path) -> None:
        self._checkpoints = checkpoints
        # Of each that is on the disk, by its key: a step alone may stand for a history undone.
        self._checksums: dict[int, bytes] = {}

    def note(self, key: int, folder: Path) -> None:
        """``folder`` holds the snapshot ``key``."""
        self._checksums[key] = (folder / CHECKSUM_FILE).read_bytes()

    def write(
        self, carried: Sequence[Carried], beside: Path, check: Check, store: SharedStore
    ) -> None:
        """Add ``carried`` to the unfinished checkpoint ``beside``; every process calls it."""
        if not carried:
            return
        if store.rank == 0:
            to_write: list[int] = []
            try:
                self._forget_all_but({one.key for one in carried})
                to_write = [one.key for one in carried if not self._link(one, beside, check)]
            finally:
                store.put(_TO_WRITE, to_write)
        else:
            [to_write] = store.wait_for([_TO_WRITE], check)
        for one in carried:
            if one.key in to_write:
                target = snapshot_path(beside, one.step)
                save_checkpoint(target, one.state, check, PrefixStore(store, target.name))
                if store.rank == 0:
                    self.note(one.key, target)

    def _forget_all_but(self, keys: set[int]) -> None:
        self._checksums = {key: sums for key, sums in self._checksums.items() if key in keys}

    def _link(self, one: Carried, beside: Path, check: Check) -> bool:
        """Give files of an earlier checkpoint a second name; whether that could be done."""
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
            except OSError:  # a file system that knows no such links
                shutil.rmtree(target, ignore_errors=True)
                return False
            return True
        return False


def _holds(folder: Path, sums: bytes) -> bool:
    """Whether ``folder`` is the one with these checksums, as far as sizes tell."""
    try:
        return (folder / CHECKSUM_FILE).read_bytes() == sums and has_its_sizes(folder)
    except OSError:
        return False
