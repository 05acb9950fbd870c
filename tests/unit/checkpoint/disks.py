"""Disks that are full or cannot be written, states to fill them with, and damage to files."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_PAGE = 4096  # bytes; what a tmpfs gives out at a time


@dataclass
class Disk:
    path: Path

    @contextmanager
    def filled(self, leaving_pages: int = 0) -> Iterator[None]:
        """Nothing more fits meanwhile than so many pages of content."""
        ballast = self.path / "ballast"
        with ballast.open("wb") as file:
            while self.free_pages() > leaving_pages:
                file.write(bytes(_PAGE))
                file.flush()
        try:
            yield
        finally:
            ballast.unlink()

    @contextmanager
    def read_only(self) -> Iterator[None]:
        self._remount("ro")
        try:
            yield
        finally:
            self._remount("rw")

    def free_pages(self) -> int:
        return os.statvfs(self.path).f_bavail

    def _remount(self, mode: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{mode}", str(self.path)], check=True)


def state(value: float, num_values: int = 8) -> dict[str, Any]:
    """A state in both files and in JSON; ``value`` tells it from others."""
    return {
        "model": {"w": torch.full((num_values,), value)},
        "optimizer": {"w": torch.full((num_values,), -value), "step": torch.tensor(value)},
        "progress": {"step": value},
    }


def value_of(loaded: dict[str, Any]) -> float:
    """The ``value`` of a state that was loaded, after seeing that it is that state."""
    value: float = loaded["progress"]["step"]
    expected = state(value, loaded["model"]["w"].numel())
    assert torch.equal(loaded["model"]["w"], expected["model"]["w"])
    assert torch.equal(loaded["optimizer"]["w"], expected["optimizer"]["w"])
    assert torch.equal(loaded["optimizer"]["step"], expected["optimizer"]["step"])
    return value


def hidden(folder: Path) -> list[str]:
    """The names of all that is hidden below ``folder``."""
    return sorted(path.name for path in folder.rglob(".*"))


def flip(path: Path, at: int = -1) -> None:
    """Change one bit of the byte at ``at``, counted from the end if negative."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
