"""A folder to work in, and what a command says there."""

import io
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.runs.trained_runs import train
from ultrathink.cli.main import main
from ultrathink.runs.folder import RunFolder

Say = Callable[..., str]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with an empty folder ``runs``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    return tmp_path


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return train(
        tmp_path_factory.mktemp("trained"),
        "training.max_steps=4",
        "training.checkpoint={every_steps: 2, keep: 9}",
    )


@pytest.fixture
def trained(original: RunFolder, place: Path) -> RunFolder:
    """The run ``debug`` in ``runs``, of four steps, to damage."""
    return RunFolder(shutil.copytree(original.path, place / "runs" / "debug", symlinks=True))


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


class Terminal(io.StringIO):
    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Say:
    """What a command prints on a terminal of 60 columns."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "60")
    for name in ("CI", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)

    def run(*words: str) -> str:
        screen = Terminal()
        monkeypatch.setattr(sys, "stdout", screen)
        monkeypatch.setattr(sys, "stderr", screen)
        assert main(words) == 0
        return screen.getvalue()

    return run


def without_codes(text: str) -> list[str]:
    """The lines that a terminal shows."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).splitlines()
