"""Disks of a test's own, which can be full for real."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size: str = "256k") -> Iterator[Path]:
    """A file system of ``size`` at ``folder``; skips the test where none can be mounted."""
    folder.mkdir(parents=True)
    mount = shutil.which("mount")
    if mount is None:
        pytest.skip("there is no mount command here")
    done = subprocess.run(
        [mount, "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"a disk cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Take all the room that is left; returns the file to delete for it to come back."""
    filler = disk / "filler"
    with filler.open("ab", buffering=0) as file:
        for block in (65536, 4096):
            with suppress(OSError):
                while file.write(bytes(block)):
                    pass
    assert shutil.disk_usage(disk).free == 0
    return filler
