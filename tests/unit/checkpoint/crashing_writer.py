"""A process whose children write checkpoints and crash; ``Writer`` drives it from a test.

Each child is a fork, so that none has to import torch again.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ultrathink.checkpoint.tensor_files  # noqa: F401 — else every child imports it
from tests.unit.checkpoint.disks import state
from ultrathink.runs.folder import RunFolder

CRASHED = 9


def save_and_crash(run: RunFolder, step: int, keep: int, crash_at: int) -> None:
    """Save ``step`` as the best, and end without a further word at the n-th change to the disk."""
    num_changes = 0

    def dying(change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*args: Any, **options: Any) -> Any:
            nonlocal num_changes
            num_changes += 1
            if num_changes == crash_at:
                os._exit(CRASHED)
            return change(*args, **options)

        return changed

    for name in ("rename", "replace", "symlink", "unlink", "mkdir", "rmdir", "fsync"):
        setattr(os, name, dying(getattr(os, name)))
    run.save(step, state(100 * step + crash_at), is_best=True, keep=keep)


def serve() -> None:
    for line in sys.stdin:
        step, keep, crash_at, folder = line.rstrip("\n").split(maxsplit=3)
        child = os.fork()
        if child == 0:
            run = RunFolder(Path(folder))
            save_and_crash(run, int(step), int(keep), int(crash_at))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


class Writer:
    def __init__(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.orders, self.answers = process.stdin, process.stdout

    def save(self, run: RunFolder, step: int, *, keep: int, crash_at: int) -> bool:
        """Whether the save of ``step`` came through before it was to crash."""
        print(step, keep, crash_at, run.path.absolute(), file=self.orders, flush=True)
        status = int(self.answers.readline())
        assert status in (0, CRASHED)
        return status == 0


@contextmanager
def writer() -> Iterator[Writer]:
    with subprocess.Popen(
        [sys.executable, "-m", "tests.unit.checkpoint.crashing_writer"],
        cwd=Path(__file__).parents[3],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield Writer(process)
        assert process.stdin is not None
        process.stdin.close()  # which ends it


if __name__ == "__main__":
    serve()
