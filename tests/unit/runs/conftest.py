import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.checkpoint.disks import Disk
from ultrathink.config import load_config
from ultrathink.runs.folder import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A new run folder without a checkpoint."""
    return RunFolder.create(load_config("debug", [f"run.dir={tmp_path}"]))[0]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A disk of two megabytes of the test's own."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        pytest.skip(f"this place permits no mounts: {done.stderr.strip()}")
    try:
        yield Disk(place)
    finally:
        subprocess.run(["umount", str(place)], check=True)
