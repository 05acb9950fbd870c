from pathlib import Path

import pytest

from tests.unit.training.conftest import make_trainer as make_trainer


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ULTRATHINK_CACHE", str(tmp_path / "cache"))
