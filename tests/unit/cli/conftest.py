"""A folder to work in, and what a command says there."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ultrathink.cli.main import main

Say = Callable[..., str]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with an empty folder ``runs``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    return tmp_path


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """What a command prints, or the message where it ends with status 2: never both."""

    def run(*words: str | Path, status: int = 0) -> str:
        capsys.readouterr()
        assert main(list(map(str, words))) == status
        out, err = capsys.readouterr()
        assert (out if status == 2 else err) == ""
        return err if status == 2 else out

    return run
