"""Snapshots in checkpoints: written once, linked after, and never in the way of the checkpoint."""

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.checkpoint.disks import hidden, state, value_of
from ultrathink.checkpoint.format import load_checkpoint, save_checkpoint, verify_checkpoint
from ultrathink.checkpoint.snapshots import (
    SNAPSHOTS,
    EmbeddedSnapshot,
    SnapshotWriter,
    problems_of_snapshots,
    snapshot_path,
)
from ultrathink.core.shards import TensorShard
from ultrathink.core.store import SharedStore
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.listing import size_on_disk


def saved(
    run: RunFolder,
    writer: SnapshotWriter,
    step: int,
    *embedded: EmbeddedSnapshot,
    store: SharedStore | None = None,
    check: Callable[[], None] = lambda: None,
) -> Path:
    content = {**state(step), SNAPSHOTS: [one.step for one in embedded]}
    return run.save(
        step,
        content,
        is_best=False,
        keep=9,
        store=store,
        write=partial(
            save_checkpoint, check=check, store=store, add=partial(writer.write, embedded)
        ),
    )


def inodes(folder: Path) -> set[int]:
    return {file.stat().st_ino for file in folder.iterdir()}


@pytest.fixture
def writer(run: RunFolder) -> SnapshotWriter:
    return SnapshotWriter(run.checkpoints)


ONE, TWO = EmbeddedSnapshot(1, 10, state(10)), EmbeddedSnapshot(2, 20, state(20))


def test_what_an_earlier_checkpoint_holds_is_linked(run: RunFolder, writer: SnapshotWriter) -> None:
    first = saved(run, writer, 25, ONE)
    second = saved(run, writer, 35, ONE, TWO)
    for folder in (first, second):
        verify_checkpoint(folder)
        verify_checkpoint(snapshot_path(folder, 10))
    assert value_of(load_checkpoint(snapshot_path(second, 10))) == 10
    assert value_of(load_checkpoint(snapshot_path(second, 20))) == 20
    assert inodes(snapshot_path(first, 10)) == inodes(snapshot_path(second, 10))
    assert not inodes(snapshot_path(second, 20)) & inodes(snapshot_path(second, 10))
    together = sum(size_on_disk(folder) for folder in (first, second))
    (run.checkpoints / "last").unlink()
    assert size_on_disk(run.checkpoints) == together - size_on_disk(snapshot_path(first, 10))
    shutil.rmtree(first)  # as retention does
    assert value_of(load_checkpoint(snapshot_path(second, 10))) == 10
    assert hidden(run.checkpoints) == []


def test_the_same_step_of_another_history_is_not_taken_for_it(
    run: RunFolder, writer: SnapshotWriter
) -> None:
    saved(run, writer, 25, ONE)
    folder = saved(run, SnapshotWriter(run.checkpoints), 35, EmbeddedSnapshot(7, 10, state(11)))
    assert value_of(load_checkpoint(snapshot_path(folder, 10))) == 11
    another = saved(run, writer, 45, ONE)
    assert value_of(load_checkpoint(snapshot_path(another, 10))) == 10
    later = SnapshotWriter(run.checkpoints)  # of a process that resumed and read it
    later.note(4, snapshot_path(another, 10))
    linked = saved(run, later, 55, EmbeddedSnapshot(4, 10, state(10)))
    assert inodes(snapshot_path(another, 10)) == inodes(snapshot_path(linked, 10))
    assert not (saved(run, writer, 65) / SNAPSHOTS).exists()


def test_what_is_not_whole_any_more_or_cannot_be_linked_is_written_again(
    run: RunFolder, writer: SnapshotWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = saved(run, writer, 25, ONE)
    (snapshot_path(first, 10) / "model-00001-of-00002.safetensors").write_bytes(b"")
    second = saved(run, writer, 35, ONE)
    assert problems_of_snapshots(first, {SNAPSHOTS: [10]}).keys() == {10}
    assert problems_of_snapshots(second, {SNAPSHOTS: [10]}) == {}
    assert problems_of_snapshots(second, {SNAPSHOTS: [10, 20]}) == {20: "it is missing"}
    second = saved(run, writer, 35, ONE)  # in place of the one that it links to
    assert problems_of_snapshots(second, {SNAPSHOTS: [10]}) == {}

    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "not on this file system")

    monkeypatch.setattr(os, "link", refuse)
    third = saved(run, writer, 45, ONE)
    assert problems_of_snapshots(third, {SNAPSHOTS: [10]}) == {}
    assert not inodes(snapshot_path(second, 10)) & inodes(snapshot_path(third, 10))


class Countdown:
    """A check after so many of which there is no more room."""

    def __init__(self, left: int) -> None:
        self.left = left

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise OSError(errno.ENOSPC, "no room")


def test_a_save_that_ends_among_them_leaves_nothing(run: RunFolder, writer: SnapshotWriter) -> None:
    counting = Countdown(0)
    probe = saved(run, writer, 25, ONE, TWO, check=counting)
    shutil.rmtree(probe)
    for last in range(1, -counting.left, 3):
        with pytest.raises(OSError, match="no room"):
            saved(run, SnapshotWriter(run.checkpoints), 25, ONE, TWO, check=Countdown(last))
        assert run.steps() == []
        assert hidden(run.checkpoints) == []
    assert last > 20
    assert problems_of_snapshots(saved(run, writer, 25, ONE, TWO), {SNAPSHOTS: [10, 20]}) == {}


def half(rank: int, step: int) -> EmbeddedSnapshot:
    """What a process of two holds of a snapshot."""
    shard = TensorShard(torch.full((4,), float(step)), (4 * rank,), (8,), torch.float32)
    return EmbeddedSnapshot(step, step, {"model": {"w": shard}, "progress": {"step": step}})  # type: ignore[dict-item]


class ThreadStore:
    """The store of threads; nobody gives up waiting."""

    def __init__(self, rank: int, size: int, values: dict[str, Any]) -> None:
        self.rank, self.size, self.values = rank, size, values

    def put(self, key: str, value: Any) -> None:
        assert key not in self.values
        self.values[key] = value

    def wait_for(self, keys: Sequence[str], check: Callable[[], None]) -> list[Any]:
        deadline = time.monotonic() + 30
        while not all(key in self.values for key in keys):
            assert time.monotonic() < deadline, f"nobody put {keys}"
            time.sleep(0.001)
        return [self.values[key] for key in keys]

    def forget(self, keys: Sequence[str]) -> None:
        """Keys stay."""


@pytest.mark.parametrize("fails", [0, 1])
def test_where_one_of_two_processes_fails_none_writes(run: RunFolder, fails: int) -> None:
    values: dict[str, Any] = {}
    outcomes: dict[int, str] = {}
    run.checkpoints.mkdir(exist_ok=True)

    def work(rank: int) -> None:
        writer = SnapshotWriter(run.checkpoints)

        def check() -> None:
            if rank == fails and "snapshots to write" in values:
                raise OSError(errno.ENOSPC, "no room")

        try:
            store = ThreadStore(rank, 2, values)
            saved(run, writer, 25, half(rank, 10), half(rank, 20), store=store, check=check)
        except OSError as error:
            outcomes[rank] = error.strerror

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert outcomes[fails] == "no room"
    assert outcomes.keys() == {0, 1}
    assert run.steps() == []
    assert hidden(run.checkpoints) == []
