"""Starting ``ultrathink launch`` in tests, watching it and doing harm to its processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

DEADLINE_S = 90.0
TINY = (
    "model.hidden_size=32",
    "model.num_heads=2",
    "data.seq_len=32",
    "data.train=[{type: dummy, num_documents: 60, num_words: 40}]",
    "training.batch_size=4",
    "training.log_every=1",
    "training.sample.prompts=[]",
    "monitoring.sinks=[console, jsonl]",
    "run.name=together",
)


class Launched:
    """A launcher with its processes, in a session of its own, working in ``place``."""

    def __init__(self, place: Path, *words: str, command: tuple[str, ...] = ()) -> None:
        self.run = place / "runs" / "together"
        self._errors = place / "stderr.txt"
        start = command or (sys.executable, "-m", "ultrathink", "launch", "--nproc", "2")
        with self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [*start, *words],
                cwd=place,
                env={**os.environ, "ULTRATHINK_CACHE": str(place / "cache")},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )

    @property
    def errors(self) -> str:
        """What it has printed to standard error so far."""
        return self._errors.read_text(encoding="utf-8", errors="replace")

    def rows(self) -> list[dict[str, Any]]:
        """The whole lines of metrics.jsonl so far, of training steps."""
        try:
            text = (self.run / "metrics.jsonl").read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        lines = text[: text.rfind("\n") + 1].splitlines()
        return [row for row in map(json.loads, lines) if row["split"] == "train"]

    def wait_for_step(self, step: int) -> None:
        """Return once step ``step`` was logged."""
        self.wait_until(lambda: any(row["step"] >= step for row in self.rows()), f"step {step}")

    def wait_until(self, holds: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not holds():
            assert time.monotonic() < deadline, f"{what} did not come:\n{self.errors}"
            assert self.process.poll() is None, f"it ended before {what}:\n{self.errors}"
            time.sleep(0.01)

    def workers(self) -> list[int]:
        """The process numbers of those that train, by rank."""
        found = {}
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                variables = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            rank = [v for v in variables if v.startswith(b"RANK=")]
            if parent == self.process.pid and rank:
                found[int(rank[0][5:])] = int(folder.name)
        return [found[rank] for rank in sorted(found)]

    def addresses(self) -> set[str]:
        """Where the launcher and its processes listen: addresses as /proc/net has them."""
        inodes = set()
        for pid in (self.process.pid, *self.workers()):
            for file in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    inodes.add(os.readlink(file).removeprefix("socket:[").removesuffix("]"))
        found = set()
        for table in ("/proc/net/tcp", "/proc/net/tcp6"):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and fields[9] in inodes:
                    found.add(fields[1].partition(":")[0])
        return found

    def finish(self) -> int:
        """Wait for the end; its exit status."""
        try:
            return self.process.wait(DEADLINE_S)
        finally:
            self.kill()

    def kill(self) -> None:
        """Leave nothing behind."""
        for pid in self.workers():
            os.kill(pid, signal.SIGKILL)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
