from pathlib import Path

import pytest

from ultrathink.parallel.restarts import remember_run, run_to_go_on_with
from ultrathink.parallel.world import World


@pytest.fixture
def pointer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "pointers" / "run"
    monkeypatch.setenv("ULTRATHINK_RUN_POINTER", str(path))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any")
    return path


def test_who_is_started_again_goes_on_with_the_same_run(
    pointer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remember_run(tmp_path / "runs" / "demo", World(rank=0, size=2))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert run_to_go_on_with() == tmp_path / "runs" / "demo"


def test_a_first_start_does_not_trust_what_another_left(
    pointer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remember_run(tmp_path, World(rank=0, size=2))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert run_to_go_on_with() is None
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert run_to_go_on_with() is None


def test_who_was_not_launched_leaves_no_word(
    pointer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    remember_run(tmp_path, World())
    assert not pointer.exists()
