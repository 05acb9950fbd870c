"""Processes of ``ultrathink``: run to their end, or watched by the files they write, and killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

POLL_S = 0.001
ULTRATHINK = (sys.executable, "-m", "ultrathink")
_TAIL_BYTES = 8192  # holds the last line of metrics.jsonl


def ultrathink(
    place: Path, *words: str, stdin: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """``ultrathink WORDS`` with one thread, working in ``place``, at its end."""
    own = {"ULTRATHINK_CACHE": str(place / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*ULTRATHINK, *words],
        cwd=place,
        env={**os.environ, **own, **environment},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=600,
    )


class Session:
    """``ultrathink WORDS`` in a process group of its own, working in ``place``.

    ``run`` is the folder in which it trains, ``cache`` the name of the folder of its tokenized
    data; compiled code is shared. What it prints goes to files, so that a pipe that nobody reads
    can never hold it up.
    """

    def __init__(
        self,
        place: Path,
        run: Path,
        *words: str,
        cache: str = "cache",
        command: tuple[str, ...] = ULTRATHINK,
    ) -> None:
        self.run = run
        self.words = words
        output = place / "output"
        output.mkdir(parents=True, exist_ok=True)
        number = len(list(output.iterdir())) // 2 + 1
        self._stdout, self._stderr = output / f"{number:03d}.out", output / f"{number:03d}.err"
        self.launched = time.time()
        with self._stdout.open("wb") as stdout, self._stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                [*command, *words],
                cwd=place,
                env={
                    **os.environ,
                    "ULTRATHINK_CACHE": str(place / cache),
                    "TORCHINDUCTOR_CACHE_DIR": os.environ.get(
                        "TORCHINDUCTOR_CACHE_DIR", str(place / "compiled")
                    ),
                },
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        self.first_step_s: float | None = None  # its age when it was seen to log a step
        self._seen_size = -1
        self._step = 0

    # -- watching ------------------------------------------------------------------------------

    @property
    def age_s(self) -> float:
        return time.time() - self.launched

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def stdout(self) -> str:
        return self._stdout.read_text(encoding="utf-8", errors="replace")

    @property
    def stderr(self) -> str:
        return self._stderr.read_text(encoding="utf-8", errors="replace")

    def step(self) -> int:
        """The last step that this process has logged, 0 before its first."""
        metrics = self.run / "metrics.jsonl"
        try:
            size = metrics.stat().st_size
            if size == self._seen_size:
                return self._step
            with metrics.open("rb") as file:
                file.seek(max(0, size - _TAIL_BYTES))
                lines = file.read().split(b"\n")[1:-1]  # whole lines only
        except FileNotFoundError:
            return 0
        self._seen_size = size
        for line in lines:
            record = json.loads(line)
            if record["time"] > self.launched:  # not a line of the process before
                self._step = record["step"]
                self.first_step_s = self.first_step_s or self.age_s
        return self._step

    def is_writing(self) -> bool:
        """Whether a checkpoint that this process began to write is not yet in its place."""
        try:
            entries = list(os.scandir(self.run / "checkpoints"))
        except FileNotFoundError:
            return False
        return any(
            entry.name.startswith(".step_") and entry.name.endswith(".tmp") and self._is_own(entry)
            for entry in entries
        )

    def _is_own(self, entry: os.DirEntry[str]) -> bool:
        try:
            changed = entry.stat(follow_symlinks=False).st_mtime
        except FileNotFoundError:
            return False
        return changed > self.launched - 0.05  # the clock of files runs a little behind

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 300) -> bool:
        """Wait for ``condition``; False where the process ended before it held."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if self.has_ended:
                return False
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"{self.words} in {timeout_s:.0f} s:\n{self.stderr}")
            time.sleep(POLL_S)
        return True

    # -- ending --------------------------------------------------------------------------------

    def finish(self, timeout_s: float = 600) -> str:
        """Wait for a good end; what stands on standard output."""
        self.wait_until(lambda: False, timeout_s)
        if self.process.returncode != 0:
            raise RuntimeError(self.complaint())
        return self.stdout

    def complaint(self) -> str:
        """How the process ended and what it said last."""
        said = "\n".join(self.stderr.splitlines()[-12:])
        return f"{' '.join(self.words)} ended with status {self.process.returncode}:\n{said}"

    def signal_all(self, number: signal.Signals) -> None:
        """Send ``number`` to the process and all it started, as a terminal does with Ctrl-C."""
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return

    def kill(self, *, alone: bool = False) -> None:
        """SIGKILL the whole group, or, ``alone``, the trainer and none of its loader workers."""
        if alone:
            self.process.kill()
        else:
            self.signal_all(signal.SIGKILL)
        self.process.wait()

    def survivors(self) -> list[int]:
        """Processes of the group that still live, its loader workers for example."""
        return [
            int(entry.name)
            for entry in Path("/proc").glob("[0-9]*")
            if _group_of_living(entry) == self.process.pid
        ]


def _group_of_living(entry: Path) -> int | None:
    """The process group of a ``/proc`` entry, None where it is gone or only to be reaped."""
    try:
        # The command stands in brackets and may hold anything; what follows it is fixed.
        state, _, group = entry.joinpath("stat").read_text().rpartition(")")[2].split()[:3]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else int(group)
