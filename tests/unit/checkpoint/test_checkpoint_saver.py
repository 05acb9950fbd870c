"""Checkpoints that are written beside the training thread."""

import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.checkpoint.disks import hidden, state, value_of
from ultrathink.checkpoint.format import load_checkpoint
from ultrathink.checkpoint.saver import CheckpointSaver
from ultrathink.runs.folder import RunFolder

LARGE = 4_000_000  # values: a state that takes a moment to write


class Held(dict[str, Any]):
    """A state that cannot be written before it is let go."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.may_go = threading.Event()

    def items(self) -> Any:
        assert self.may_go.wait(60)
        return super().items()


def threads_of_savers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint ")]


def test_a_save_is_an_outcome_with_all_that_a_save_does(run: RunFolder) -> None:
    saver = CheckpointSaver(run, keep=1)
    assert (saver.outcomes(), saver.busy) == ([], False)
    for step in (1, 2, 3):
        saver.submit(step, state(step), is_best=step == 1)
    saver.close()
    outcomes = saver.outcomes()
    assert [(o.step, o.is_best, o.error, o.restored) for o in outcomes] == [
        (1, True, None, False),
        (2, False, None, False),
        (3, False, None, False),
    ]
    assert [o.path for o in outcomes] == [run.step_path(step) for step in (1, 2, 3)]
    assert all(o.seconds > 0 for o in outcomes)
    assert saver.outcomes() == []
    assert run.steps() == [1, 3]  # the best, and the one that is kept
    assert run.checkpoint("best") == run.step_path(1)
    assert threads_of_savers() == []


def test_training_continues_while_a_checkpoint_is_written(run: RunFolder) -> None:
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    saver = CheckpointSaver(run, keep=2)
    held = Held(state(1))
    saver.submit(1, held, is_best=False)
    assert saver.busy
    assert (run.steps(), saver.outcomes()) == ([], [])
    [thread] = threads_of_savers()
    assert thread.daemon
    deadline = time.monotonic() + 60
    while sys.platform == "linux" and os.getpriority(os.PRIO_PROCESS, thread.native_id) != 15:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before
    held.may_go.set()
    saver.submit(2, state(2, LARGE), is_best=False)  # waits for the first
    assert run.steps()[:1] == [1]
    assert value_of(load_checkpoint(run.step_path(1))) == 1
    saver.close()
    assert not saver.busy
    assert [outcome.step for outcome in saver.outcomes()] == [1, 2]
    saver.submit(3, state(3), is_best=False)  # closed or not
    saver.close()
    assert run.steps() == [2, 3]


@pytest.mark.parametrize("fails", [False, True], ids=["written", "failed"])
def test_a_state_is_let_go_after_it_was_written_or_not(run: RunFolder, fails: bool) -> None:
    saver = CheckpointSaver(run, keep=2)
    kept = state(1) | ({"bad": object()} if fails else {})
    tensor = weakref.ref(kept["model"]["w"])
    saver.submit(1, kept, is_best=False)
    del kept
    saver.wait()
    [outcome] = saver.outcomes()
    assert (outcome.error is not None) == fails
    gc.collect()
    assert tensor() is None


def test_whatever_goes_wrong_is_an_outcome_that_says_where(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = CheckpointSaver(run, keep=2)
    saver.submit(1, {"bad": object()}, is_best=False)  # type: ignore[dict-item]
    saver.wait()
    shared = torch.ones(3)
    saver.submit(2, {"a": shared, "b": shared}, is_best=False)
    saver.wait()
    first, second = saver.outcomes()
    assert isinstance(first.error, TypeError)
    assert "_take_tensors" in "".join(traceback.format_exception(first.error))
    assert second.error is not None

    def panic(*_: Any, **__: Any) -> None:
        raise BaseException("panicked")

    with monkeypatch.context() as patch:  # as panics of compiled libraries, which are no Exceptions
        patch.setattr("ultrathink.checkpoint.saver.save_checkpoint", panic)
        saver.submit(3, state(3), is_best=False)
        saver.wait()
    assert "panicked" in str(saver.outcomes()[0].error)

    def no_more(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_more)
        saver.submit(3, state(3), is_best=False)
        saver.close()
    assert "can't start new thread" in str(saver.outcomes()[0].error)
    saver.submit(3, state(3), is_best=False)
    saver.wait()
    assert saver.outcomes()[0].error is None
    assert run.steps() == [3]
    assert hidden(run.path) == []


# -- a run folder that vanishes -------------------------------------------------------------------


def test_a_vanished_run_folder_is_created_again_and_reported(run: RunFolder) -> None:
    run.tokenizer.mkdir()
    small = ("data.json", "manifest.json", "segments.jsonl", "tokenizer/a.json", "tokenizer/b.bin")
    for name in small:
        (run.path / name).write_bytes(name.encode() + b"\0\n")
    run.metrics.write_text("{}")
    assert set(run.founding()) == {"config.yaml", "origins.yaml", *small}
    saver = CheckpointSaver(run, keep=2)
    saver.submit(1, state(1), is_best=True)
    saver.wait()
    run.segments.write_text("{}\n")  # what comes later belongs to it too
    saver.submit(2, state(2), is_best=False)
    saver.wait()
    files = run.founding()
    shutil.rmtree(run.path)
    saver.submit(3, state(3), is_best=False)
    saver.wait()
    assert [(o.error, o.restored) for o in saver.outcomes()] == [
        (None, False),
        (None, False),
        (None, True),
    ]
    assert run.founding() == files
    assert run.segments.read_text() == "{}\n"
    assert run.logs.is_dir()
    assert run.steps() == [3]
    assert value_of(load_checkpoint(run.checkpoint())) == 3


# -- giving up ------------------------------------------------------------------------------------


def test_an_abandoned_save_ends_in_a_moment_and_leaves_nothing(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ultrathink.checkpoint.saver._EXIT_S", 0.01)
    saver = CheckpointSaver(run, keep=2)
    saver.submit(1, state(1), is_best=True)
    saver.wait()
    saver.outcomes()
    held = Held(state(2))
    saver.submit(2, held, is_best=True)
    saver.close(wait=False)
    assert not saver.busy
    saver.wait()  # waits no more
    saver.close()
    held.may_go.set()
    saver.submit(3, state(3), is_best=False)  # after the other has ended
    saver.close()
    assert [(o.step, o.error) for o in saver.outcomes()] == [(3, None)]
    assert run.steps() == [1, 3]
    assert run.checkpoint("best").name == run.step_path(1).name
    assert hidden(run.path) == []


ENDING = """
import signal, sys
from pathlib import Path
from tests.unit.checkpoint.disks import state
from ultrathink.runs.folder import RunFolder
from ultrathink.checkpoint.saver import CheckpointSaver

def hear(*_):
    if saver.busy:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

signal.signal(signal.SIGINT, signal.SIG_IGN)
saver = CheckpointSaver(RunFolder(Path(sys.argv[1])), keep=2)
step = 1
saver.submit(step, state(step, 2_000_000), is_best=False)
print("saving", flush=True)
try:
    signal.signal(signal.SIGINT, hear)
    while True:
        saver.wait()
        step += 1
        saver.submit(step, state(step, 2_000_000), is_best=False)
except KeyboardInterrupt:
    saver.close(wait=sys.argv[2] == "wait")
    print(step)
    sys.exit(130)
"""


@pytest.mark.parametrize("how", ["wait", "at once"])
def test_waiting_is_interrupted_by_ctrl_c(run: RunFolder, how: str) -> None:
    """And a process that ends meanwhile neither aborts nor leaves half a checkpoint."""
    with subprocess.Popen(
        [sys.executable, "-c", ENDING, str(run.path.absolute()), how],
        cwd=Path(__file__).parents[3],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "saving\n"
        deadline = time.monotonic() + 60
        while process.poll() is None:  # until it is heard while a save is under way
            assert time.monotonic() < deadline
            process.send_signal(signal.SIGINT)
            time.sleep(0.02)
        out, err = process.communicate()
    assert (process.returncode, err) == (130, "")
    if how == "wait":
        assert run.steps()[-1] == int(out)
    for step in run.steps():
        assert value_of(load_checkpoint(run.step_path(step))) == step
    assert hidden(run.path) == []


def test_a_process_that_ends_without_closing_finishes_what_it_writes(run: RunFolder) -> None:
    code = ENDING.partition("try:")[0]  # it is not over then
    done = subprocess.run(
        [sys.executable, "-c", code, str(run.path.absolute())],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert run.steps() == [1]
    assert value_of(load_checkpoint(run.step_path(1))) == 1
