"""One run on two processes, by its commands, and what may happen to the processes."""

import json
import os
import re
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.launching import LAUNCH, TINY, Launched
from tests.stress.evidence import row_differences, rows
from ultrathink.runs.folder import RunFolder

LOOPBACK = "0100007F"  # 127.0.0.1, as /proc/net/tcp has it
TORCHRUN = (
    *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"),
    *("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"),
    *("-m", "ultrathink", "train"),
)
CHECKPOINTS = "training.checkpoint={every_steps: 5, keep: 9}"


Start = Callable[..., Launched]


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


def test_a_killed_process_is_restarted_and_the_run_is_that_of_torchrun(start: Start) -> None:
    words = ("debug", *TINY, "training.max_steps=40", CHECKPOINTS)
    whole = start(*words, place="whole", command=TORCHRUN)
    assert whole.status() == 0, whole.stderr
    (segment,) = (whole.run / "segments.jsonl").read_text().splitlines()
    assert json.loads(segment)["environment"]["processes"] == 2
    hit = start(*words, place="hit")
    hit.wait_for_step(12)
    os.kill(hit.workers()[1], signal.SIGKILL)
    assert hit.status() == 0, hit.stderr
    assert "process 1 was killed by SIGKILL; all restart from the last checkpoint" in hit.stderr
    assert "Traceback" not in hit.stderr
    assert row_differences(rows(whole.run), rows(hit.run)) == []
    assert hit.stderr.count("Finished after step 40") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_all_save_and_stop(start: Start, number: int) -> None:
    run = start("debug", *TINY, "training.max_steps=100000")
    run.wait_for_step(5)
    assert run.addresses() <= {LOOPBACK}
    os.kill(run.process.pid, number)
    assert run.status() == 128 + number, run.stderr
    step = RunFolder(run.run).steps()[-1]
    assert run.step() in (step, step - 1)
    assert f"Stopped after step {step}" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_process_that_hangs_is_ended_with_its_stacks(start: Start, tmp_path: Path) -> None:
    where = "trainer.progress.step == 7 and trainer.world.rank == 1 and not once.exists()"
    hang = f"if {where}: once.touch(); time.sleep(1000)"
    words = ("debug", *TINY, "training.max_steps=12", CHECKPOINTS, "parallel.hang_minutes=0.05")
    run = start(plugin(tmp_path, hang), *words)
    assert run.status() == 0, run.stderr
    reported = (
        r"process [01] took no step for too long \(RUN/logs/stacks-[01]\.txt says where\); all"
    )
    assert re.search(reported, run.stderr)
    stacks = [(run.run / "logs" / f"stacks-{rank}.txt").read_text() for rank in (0, 1)]
    assert "harm.py" in stacks[1]
    assert any("all_reduce" in text or "train_step" in text for text in stacks[:1])
    assert run.step() == 12


def test_an_exception_on_one_process_is_reported_once(start: Start, tmp_path: Path) -> None:
    fail = "if trainer.progress.step == 3 and trainer.world.rank == 1: raise KeyError('broken')"
    run = start(plugin(tmp_path, fail), "debug", *TINY)
    assert run.status() == 70
    assert run.stderr.count("Traceback") == 1
    assert "error: process 1 failed:" in run.stderr
    assert "KeyError: 'broken'" in run.stderr


def test_a_mistake_is_reported_once(start: Start) -> None:
    run = start("debug", *TINY, "parallel.dp_replicate=3")
    assert run.status() == 2
    assert run.stderr.count("error:") == 1
    assert "2 processes cannot be divided into 3 equal groups" in run.stderr


def test_a_single_process_is_replaced_too(start: Start) -> None:
    words = ("debug", *TINY, "training.max_steps=200", CHECKPOINTS)
    run = start(*words, command=(*LAUNCH, "1"))
    run.wait_for_step(12)
    os.kill(run.workers()[0], signal.SIGKILL)
    assert run.status() == 0, run.stderr
    assert run.step() == 200
    assert [path.name for path in run.run.parent.iterdir()] == ["together"]


def test_machines_meet_at_an_address(start: Start) -> None:
    """Two launchers of one process each, as on two machines."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = (*LAUNCH, "1", "--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{port}")
    first, second = (start("debug", *TINY, command=command) for _ in range(2))
    assert first.status() == 0, first.stderr
    assert second.status() == 0, second.stderr
    assert first.step() == 20
    assert [path.name for path in first.run.parent.iterdir()] == ["together"]
