"""Real training logs, where the folder of test data is there."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def real_log() -> Callable[[str], Path]:
    """Path of a public training log; skips where the folder of them is absent."""

    def find(name: str) -> Path:
        named = os.environ.get("ULTRATHINK_TEST_DATA")
        folder = Path(named) if named else REPOSITORY / "../shared/data"
        path = folder / "logs" / name
        if not path.is_file():
            pytest.skip(f"{path} is absent; name the folder of test data in ULTRATHINK_TEST_DATA")
        return path

    return find
