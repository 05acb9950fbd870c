"""What is costly to make and only read by tests is made once for all processes of a test run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


class Shared:
    """Folders below ``base``, each filled once; xdist has a session, and its fixtures, a worker."""

    def __init__(self, base: Path) -> None:
        self.base = base

    def folder(self, name: str, fill: Callable[[Path], object]) -> Path:
        """The folder called ``name``, as ``fill`` has filled it; nobody may change it."""
        self.base.mkdir(parents=True, exist_ok=True)
        folder, done = self.base / name, self.base / f"{name}.done"
        with FileLock(f"{folder}.lock"):
            if not done.exists():
                folder.mkdir()  # a second try finds it there: what failed once fails for all
                fill(folder)
                done.touch()
        return folder
