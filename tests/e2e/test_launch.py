"""One run on two processes, by its commands, and what may happen to the processes."""

import json
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.launching import TINY, Launched
from tests.stress.evidence import row_differences, rows
from ultrathink.runs.folder import RunFolder

LOOPBACK = "0100007F"  # 127.0.0.1, as /proc/net/tcp has it
CHECKPOINTS = "training.checkpoint={every_steps: 5, keep: 9}"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[type[Launched]]:
    started: list[Launched] = []

    class Here(Launched):
        def __init__(self, *words: str, place: str = "here", command: tuple[str, ...] = ()):
            folder = tmp_path / place
            folder.mkdir(exist_ok=True)
            super().__init__(folder, *words, command=command)
            started.append(self)

    yield Here
    for one in started:
        one.kill()


def plugin(tmp_path: Path, body: str) -> str:
    """A plugin that does ``body`` before each step; ``trainer`` is there, and ``once``, a file."""
    path = tmp_path / "harm.py"
    path.write_text(
        "import time\n"
        "from pathlib import Path\n"
        "from ultrathink.training.trainer import Trainer\n"
        f"once = Path({str(tmp_path / 'once')!r})\n"
        "original = Trainer.train_step\n"
        "def train_step(trainer):\n"
        f"    {body}\n"
        "    return original(trainer)\n"
        "Trainer.train_step = train_step\n"
    )
    return f"--plugin={path}"


def test_a_killed_process_is_started_again_and_the_run_is_the_same(start: type[Launched]) -> None:
    words = ("debug", *TINY, "training.max_steps=40", CHECKPOINTS)
    whole = start(*words, place="whole")
    assert whole.finish() == 0, whole.errors
    hit = start(*words, place="hit")
    hit.wait_for_step(12)
    os.kill(hit.workers()[1], signal.SIGKILL)
    assert hit.finish() == 0, hit.errors
    assert "process 1 was killed by SIGKILL; all start again from the last checkpoint" in hit.errors
    assert "Traceback" not in hit.errors
    timed = ("communication_share", "compute_s_fastest", "compute_s_slowest")
    expected, found = (
        [{k: v for k, v in row.items() if k not in timed} for row in rows(one.run)]
        for one in (whole, hit)
    )
    assert row_differences(expected, found) == []
    assert hit.errors.count("Finished after step 40") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_all_save_and_stop(start: type[Launched], number: int) -> None:
    run = start("debug", *TINY, "training.max_steps=100000")
    run.wait_for_step(5)
    assert run.addresses() <= {LOOPBACK}
    os.kill(run.process.pid, number)
    assert run.finish() == 128 + number, run.errors
    step = RunFolder(run.run).steps()[-1]
    assert run.rows()[-1]["step"] in (step, step - 1)
    assert f"Stopped after step {step}" in run.errors
    assert "Traceback" not in run.errors


def test_a_process_that_hangs_is_ended_with_its_stacks(
    start: type[Launched], tmp_path: Path
) -> None:
    where = "trainer.progress.step == 7 and trainer.world.rank == 1 and not once.exists()"
    hang = f"if {where}: once.touch(); time.sleep(1000)"
    words = ("debug", *TINY, "training.max_steps=12", CHECKPOINTS, "parallel.hang_minutes=0.05")
    run = start(plugin(tmp_path, hang), *words)
    assert run.finish() == 0, run.errors
    told = r"process [01] took no step for too long \(RUN/logs/stacks-[01]\.txt says where\); all"
    assert re.search(told, run.errors)
    stacks = [(run.run / "logs" / f"stacks-{rank}.txt").read_text() for rank in (0, 1)]
    assert "harm.py" in stacks[1]
    assert any("all_reduce" in text or "train_step" in text for text in stacks[:1])
    assert run.rows()[-1]["step"] == 12


def test_an_exception_on_one_process_is_told_once(start: type[Launched], tmp_path: Path) -> None:
    fail = "if trainer.progress.step == 3 and trainer.world.rank == 1: raise KeyError('broken')"
    run = start(plugin(tmp_path, fail), "debug", *TINY)
    assert run.finish() == 70
    assert run.errors.count("Traceback") == 1
    assert "error: process 1 failed:" in run.errors
    assert "KeyError: 'broken'" in run.errors


def test_a_mistake_is_told_once(start: type[Launched]) -> None:
    run = start("debug", *TINY, "parallel.dp_replicate=3")
    assert run.finish() == 2
    assert run.errors.count("error:") == 1
    assert "2 processes cannot be divided into 3 equal groups" in run.errors


def test_a_single_process_is_replaced_too(start: type[Launched]) -> None:
    launcher = (sys.executable, "-m", "ultrathink", "launch", "--nproc", "1")
    run = start("debug", *TINY, "training.max_steps=200", CHECKPOINTS, command=launcher)
    run.wait_for_step(12)
    os.kill(run.workers()[0], signal.SIGKILL)
    assert run.finish() == 0, run.errors
    assert run.rows()[-1]["step"] == 200
    assert [path.name for path in run.run.parent.iterdir()] == ["together"]


def test_machines_meet_at_an_address(start: type[Launched]) -> None:
    """Two launchers of one process each, as on two machines."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = (sys.executable, "-m", "ultrathink", "launch", "--nproc", "1", "--nnodes", "2")
    command = (*launcher, "--rdzv-endpoint", f"127.0.0.1:{port}")
    first, second = (start("debug", *TINY, command=command) for _ in range(2))
    assert first.finish() == 0, first.errors
    assert second.finish() == 0, second.errors
    assert first.rows()[-1]["step"] == 20
    assert [path.name for path in first.run.parent.iterdir()] == ["together"]


def test_torchrun_starts_it_as_well(start: type[Launched]) -> None:
    torchrun = (
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"),
        *("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"),
        *("-m", "ultrathink", "train"),
    )
    run = start("debug", *TINY, "training.max_steps=4", command=torchrun)
    assert run.finish() == 0, run.errors
    assert [row["step"] for row in run.rows()] == [1, 2, 3, 4]
    segment = json.loads((run.run / "segments.jsonl").read_text().splitlines()[0])
    assert segment["environment"]["processes"] == 2
