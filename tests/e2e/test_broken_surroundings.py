"""Runs whose reader leaves and whose terminal closes, from the command line."""

from __future__ import annotations

import json
import os
import pty
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.stress.process import ULTRATHINK, ultrathink

OPTIONS = ("training.max_steps=200", "training.log_every=5", "run.dir=runs")

# Makes its terminal the one that controls it, with SIGHUP "ignored" (as nohup does) or not.
OWN_TERMINAL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGHUP, signal.SIG_IGN if sys.argv[1] == "ignored" else signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("surroundings")


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> list[tuple[Any, ...]]:
    done = ultrathink(place, *words("undisturbed"))
    assert done.returncode == 0, done.stderr
    assert told_gone(place, "undisturbed") == []
    return losses(place, "undisturbed")


def words(name: str, *options: str) -> list[str]:
    return ["train", "debug", *OPTIONS, f"run.name={name}", *options]


def environment(place: Path) -> dict[str, str]:
    unwanted = ("CI", "PYTHONUNBUFFERED", "COLUMNS", "LINES")
    kept = {name: value for name, value in os.environ.items() if name not in unwanted}
    own = {"ULTRATHINK_CACHE": str(place / "cache"), "OMP_NUM_THREADS": "1", "TERM": "xterm"}
    return {**kept, **own}


def losses(place: Path, name: str) -> list[tuple[Any, ...]]:
    lines = (place / "runs" / name / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [(row["step"], row["split"], row["loss"]) for row in rows]


def log(place: Path, name: str) -> list[str]:
    return (place / "runs" / name / "logs" / "run.log").read_text().splitlines()


def told_gone(place: Path, name: str) -> list[str]:
    return [line for line in log(place, name) if "the console cannot be written to" in line]


def test_a_reader_that_leaves_changes_neither_the_run_nor_its_status(
    place: Path, undisturbed: list[tuple[Any, ...]]
) -> None:
    line = f"{shlex.join([*ULTRATHINK, *words('headless')])} 2>&1 | head -1"
    done = subprocess.run(
        ["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"],
        cwd=place,
        env=environment(place),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.count("\n") == 1
    assert done.returncode == 0, done.stderr
    assert losses(place, "headless") == undisturbed
    (told,) = told_gone(place, "headless")
    assert "(BrokenPipeError: [Errno 32] Broken pipe); training continues" in told


def train_until_the_terminal_closes(place: Path, name: str, hangup: str, *options: str) -> int:
    """Close the terminal of a run once it has logged some steps; returns its exit status."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", OWN_TERMINAL, hangup, *ULTRATHINK[1:], *words(name, *options)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=place,
        env=environment(place),
        start_new_session=True,
    )
    os.close(theirs)
    os.set_blocking(ours, False)
    metrics = place / "runs" / name / "metrics.jsonl"
    shown = b""
    try:
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text().count("\n") > 3):
            assert time.monotonic() < deadline
            assert process.poll() is None, shown.decode()
            try:
                shown += os.read(ours, 65536)
            except BlockingIOError:
                time.sleep(0.02)
        os.close(ours)
        assert b"\x1b[?25l" in shown  # the bar was there
        return process.wait(timeout=120)
    finally:
        process.kill()
        process.wait()


def test_a_run_that_ignores_hangups_goes_on_without_its_terminal(
    place: Path, undisturbed: list[tuple[Any, ...]]
) -> None:
    assert train_until_the_terminal_closes(place, "nohup", "ignored") == 0
    assert losses(place, "nohup") == undisturbed
    (told,) = told_gone(place, "nohup")
    assert "(OSError: [Errno 5] Input/output error); training continues" in told


def test_a_hangup_saves_and_ends_the_run_with_its_own_status(place: Path) -> None:
    options = "training.max_steps=100000"
    assert train_until_the_terminal_closes(place, "hangup", "heard", options) == 128 + 1
    last = losses(place, "hangup")[-1][0]
    saved = (place / "runs" / "hangup" / "checkpoints" / "last").resolve().name
    assert last <= int(saved.removeprefix("step_")) < last + 5
    assert any("SIGHUP: saving after this step" in line for line in log(place, "hangup"))
