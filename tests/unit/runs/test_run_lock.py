"""Two processes that want one run folder."""

import gc
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ultrathink.core.errors import CheckpointError
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.lock import Owner, RunLock, holder

HOLDING = """
import sys
from pathlib import Path
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.lock import RunLock
lock = RunLock.acquire(RunFolder(Path(sys.argv[1])))
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def holding_process(run: RunFolder, code: str = HOLDING) -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen(
        [sys.executable, "-c", code, str(run.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def holding_pid(run: RunFolder) -> int | None:
    """The process that holds the run, None where it is free."""
    owner = holder(run)
    return owner.pid if owner is not None else None


def test_a_second_process_learns_who_holds_the_run(run: RunFolder) -> None:
    files = sorted(run.path.iterdir())
    assert holder(run) is None
    assert sorted(run.path.iterdir()) == files  # asking leaves no trace
    before = time.time() - 60
    with holding_process(run) as process:
        owner = holder(run)
        assert owner is not None
        assert (owner.pid, owner.host) == (process.pid, socket.gethostname())
        assert before < owner.started < time.time()
        assert owner.command.startswith("-c ")
        with pytest.raises(CheckpointError) as caught:
            RunLock.acquire(run, timeout_s=0.1)
        said = str(caught.value)
        assert f"{run.path} is in use by process {process.pid} on host {owner.host}, since" in said
        assert f"wait for it or stop it (kill {process.pid})" in said
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (run.path / ".owner.json").exists()  # what a killed process leaves
        assert holder(run) is None
        with RunLock.acquire(run):
            assert holding_pid(run) == os.getpid()


def test_releasing_from_another_thread_and_twice(run: RunFolder) -> None:
    first = RunLock.acquire(run)
    thread = threading.Thread(target=first.release)
    thread.start()
    thread.join()
    assert holder(run) is None
    second = RunLock.acquire(run)
    first.release()
    assert holding_pid(run) == os.getpid()
    with pytest.raises(CheckpointError, match="which is this one: let its other trainer end first"):
        RunLock.acquire(run, timeout_s=0.05)
    del second  # nobody refers to it any more
    gc.collect()
    assert holder(run) is None
    assert not (run.path / ".owner.json").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_that_ends_takes_nothing_from_its_parent(run: RunFolder) -> None:
    """As the workers that load data do."""
    code = HOLDING.replace(
        'print("held"',
        """
import os, gc
child = os.fork()
if child == 0:
    del lock
    gc.collect()
    sys.exit()
os.waitpid(child, 0)
print("held\"""",
    )
    with holding_process(run, code) as process:
        assert holding_pid(run) == process.pid


def test_asking_disturbs_nobody(run: RunFolder) -> None:
    """Who acquires while others ask gets the lock; who asks takes nobody that asks for a holder."""
    RunLock.acquire(run).release()
    over = threading.Event()
    found: list[Owner | None] = []

    def ask() -> None:
        while not over.is_set():
            found.append(holder(run))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20
    try:
        while len(found) < 100:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert set(found) == {None}
        for _ in range(10):
            RunLock.acquire(run).release()
    finally:
        over.set()
        for thread in threads:
            thread.join()


def test_a_folder_that_is_not_there_cannot_be_locked(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"gone cannot be locked.*No such file"):
        RunLock.acquire(run, timeout_s=0.1)
    assert holder(run) is None
    assert not run.path.exists()


def test_an_owner_on_another_machine_is_to_be_stopped_there(run: RunFolder) -> None:
    with RunLock.acquire(run):
        owner = {"pid": 7, "host": "elsewhere", "started": 0.0, "command": "train"}
        (run.path / ".owner.json").write_text(json.dumps(owner))
        with pytest.raises(CheckpointError, match=r"elsewhere, since .*wait for it or stop it th"):
            RunLock.acquire(run, timeout_s=0.05)
        (run.path / ".owner.json").write_text("{")
        with pytest.raises(CheckpointError, match="in use by another process"):
            RunLock.acquire(run, timeout_s=0.05)


def test_a_run_that_vanished_and_was_created_again_is_held_again(run: RunFolder) -> None:
    files = run.founding()
    with RunLock.acquire(run) as lock:
        lock.renew()  # nothing to do
        shutil.rmtree(run.path)
        run.restore_founding(files)
        assert holder(run) is None  # what was locked is gone
        lock.renew()
        assert holding_pid(run) == os.getpid()
    assert holder(run) is None
    lock.renew()
    assert holder(run) is None
    with RunLock.acquire(run) as lock:
        shutil.rmtree(run.path)
        run.restore_founding(files)
        with holding_process(run) as process:
            with pytest.raises(CheckpointError, match=f"in use by process {process.pid}"):
                lock.renew()
            lock.release()
            assert holding_pid(run) == process.pid
