"""Disks that are full or cannot be written, for real: small ones of the tests' own."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from tests.unit.checkpoint.disks import Disk, hidden, state, value_of
from ultrathink.checkpoint.format import load_checkpoint, save_checkpoint
from ultrathink.checkpoint.saver import CheckpointSaver, Outcome
from ultrathink.config import load_config
from ultrathink.core.errors import CheckpointError
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.lock import RunLock, holder


@pytest.fixture
def run(disk: Disk) -> RunFolder:
    return RunFolder.create(load_config("debug", [f"run.dir={disk.path}"]))[0]


def save(saver: CheckpointSaver, step: int, *, is_best: bool = False) -> Outcome:
    saver.submit(step, state(step, 1000), is_best=is_best)
    saver.wait()
    [outcome] = saver.outcomes()
    return outcome


def failure(disk: Disk, folder: Path, free: int) -> OSError | None:
    with disk.filled(leaving_pages=free):
        try:
            save_checkpoint(folder, state(2, 8000))
        except OSError as error:
            return error
    return None


def test_a_disk_that_fills_up_at_any_page_leaves_the_old_checkpoint_and_nothing_else(
    disk: Disk,
) -> None:
    folder = disk.path / "step_00000001"
    save_checkpoint(folder, state(1))
    free = 0
    while (error := failure(disk, folder, free)) is not None:
        assert error.errno == errno.ENOSPC
        assert str(error.filename).startswith(str(disk.path))
        assert [path.name for path in disk.path.iterdir()] == [folder.name]
        assert value_of(load_checkpoint(folder)) == 1
        free += 1
    assert free > 16  # two files of eight pages each, and three small ones
    assert value_of(load_checkpoint(folder)) == 2
    assert [path.name for path in disk.path.iterdir()] == [folder.name]


def test_a_run_cannot_be_made_or_locked_where_nothing_can_be_written(
    disk: Disk, run: RunFolder
) -> None:
    config, before = load_config("debug", [f"run.dir={disk.path}"]), list(disk.path.iterdir())
    with disk.filled(), pytest.raises(OSError, match="No space left"):
        RunFolder.create(config)
    assert list(disk.path.iterdir()) == before
    for _ in ("without a lock file", "with one"):
        with disk.read_only():
            with pytest.raises(OSError, match="Read-only file system") as caught:
                RunFolder.create(config)
            assert str(caught.value.filename).startswith(str(disk.path))
            with pytest.raises(CheckpointError, match=r"cannot be locked.*Read-only file system"):
                RunLock.acquire(run)
            assert holder(run) is None
        RunLock.acquire(run).release()


def test_a_full_disk_can_be_locked(disk: Disk, run: RunFolder) -> None:
    owner_file = run.path / ".owner.json"  # of a killed process
    owner_file.write_text('{"pid": 7, "host": "here", "started": 0.0, "command": "train"}')
    os.link(owner_file, run.path / "else its page would be free")
    with disk.filled(), RunLock.acquire(run):
        assert str(holder(run)) == "another process"  # there was no room to say which
        with pytest.raises(CheckpointError, match="is in use by another process; wait for it"):
            RunLock.acquire(run, timeout_s=0.1)


def test_the_disk_itself_may_go_and_come_back(disk: Disk, run: RunFolder, tmp_path: Path) -> None:
    """As when a network folder is unmounted: its place is there and empty."""
    saver = CheckpointSaver(run, keep=2)
    assert save(saver, 1).error is None
    aside = tmp_path / "elsewhere"
    shutil.copytree(run.path, aside, symlinks=True)
    shutil.rmtree(run.path)
    with disk.read_only():
        outcome = save(saver, 2)
        assert isinstance(outcome.error, OSError)
        assert outcome.error.errno == errno.EROFS
        assert not outcome.restored
    shutil.copytree(aside, run.path, symlinks=True)
    outcome = save(saver, 3)
    assert outcome.error is None
    assert not outcome.restored
    assert run.steps() == [1, 3]
    assert hidden(run.path) == []
