from pathlib import Path

import pytest

from ultrathink.parallel.restarts import remember_run, run_to_resume
from ultrathink.parallel.world import World


@pytest.fixture
def pointer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "pointers" / "run"
    monkeypatch.setenv("ULTRATHINK_RUN_POINTER", str(path))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any")
    return path


def test_who_is_started_again_continues_with_the_same_run(
    pointer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs" / "demo"
    remember_run(run, World(rank=0, size=2))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert run_to_resume() == run
    # A first start does not trust what another left.
    for count in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        assert run_to_resume() is None
    # Who was not launched leaves no word.
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    remember_run(run, World())
    assert not pointer.exists()
