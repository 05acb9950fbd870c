from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.checkpoint.disks import Disk
from tests.unit.monitoring.disks import small_disk
from ultrathink.config import load_config
from ultrathink.runs.folder import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A new run folder without a checkpoint."""
    return RunFolder.create(load_config("debug", [f"run.dir={tmp_path}"]))[0]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A disk of two megabytes of the test's own."""
    with small_disk(tmp_path / "disk", "2m") as place:
        yield Disk(place)
