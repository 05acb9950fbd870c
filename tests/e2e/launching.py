"""``ultrathink launch`` in tests, and harm done to its processes."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

from tests.stress.process import ULTRATHINK, Session

DEADLINE_S = 90.0
LAUNCH = (*ULTRATHINK, "launch", "--nproc")
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


class Launched(Session):
    """A launcher with its processes, working in ``place``."""

    def __init__(self, place: Path, *words: str, command: tuple[str, ...] = (*LAUNCH, "2")) -> None:
        super().__init__(place, place / "runs" / "together", *words, command=command)

    def wait_for_step(self, step: int) -> None:
        """Return once step ``step`` was logged."""
        assert self.wait_until(lambda: self.step() >= step, DEADLINE_S), self.complaint()

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

    def status(self) -> int:
        """Its exit status, once it has ended."""
        self.wait_until(lambda: False, DEADLINE_S)
        self.kill()
        return int(self.process.returncode)

    def kill(self, *, alone: bool = False) -> None:
        """Leave nothing behind: its processes are in groups of their own."""
        for pid in self.workers():
            os.kill(pid, signal.SIGKILL)
        super().kill(alone=alone)
