"""Data workers that die, and trainers that do."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from tests.unit.data.data_helpers import store_of
from tests.unit.data.worker_answers import (
    double,
    echo,
    killed_at_three,
    large,
    leaving_at_three,
    picky,
)
from ultrathink.config.data import PackingConfig
from ultrathink.core.errors import DataError
from ultrathink.data.cache import TokenStore
from ultrathink.data.loader import TrainLoader
from ultrathink.data.packing import SampleReader
from ultrathink.data.workers import WorkerPool

ROOT = Path(__file__).parents[3]


def until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    """Wait for ``condition``, and fail where it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def kill(process: BaseProcess, number: int = signal.SIGKILL) -> None:
    """Kill a process, and wait until it is gone."""
    assert process.pid is not None
    os.kill(process.pid, number)
    until(lambda: not process.is_alive())


@pytest.fixture
def start() -> Iterator[Callable[..., WorkerPool[Any, Any]]]:
    pools: list[WorkerPool[Any, Any]] = []

    def start_one(answer: Any, num_workers: int, notes: list[str]) -> WorkerPool[Any, Any]:
        pools.append(WorkerPool(answer, num_workers, notes))
        return pools[-1]

    yield start_one
    for pool in pools:
        pool.stop()
    assert multiprocessing.active_children() == []


Start = Callable[..., WorkerPool[Any, Any]]


# -- the pool -----------------------------------------------------------------------------------


def test_large_requests_and_large_answers_do_not_wait_for_each_other(start: Start) -> None:
    pool = start(echo, 1, [])
    contents = [bytes([number]) * 2_000_000 for number in range(4)]
    for content in contents:
        pool.submit(content)  # while the worker waits for somebody to read its first answer
    assert [pool.receive() for _ in contents] == contents


def test_a_worker_killed_in_the_middle_of_an_answer_loses_none(start: Start) -> None:
    notes: list[str] = []
    pool = start(large, 2, notes)
    for number in range(6):
        pool.submit(number)
    first = pool._workers[0]
    assert first._answers.poll(20)  # it began to write, and waits for us to read
    pid = first._process.pid
    kill(first._process)
    assert [pool.receive() == large(number) for number in range(6)] == [True] * 6
    assert notes == [
        f"a data worker (process {pid}) was killed by SIGKILL and was restarted; the samples "
        f"stay the same"
    ]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (killed_at_three, "was killed by SIGKILL). Most likely the machine ran out of memory: fr"),
        (leaving_at_three, "ended with exit code 7). Its output above may"),
    ],
)
def test_dying_again_and_again_is_an_error_with_a_way_out(
    start: Start, answer: Callable[[int], int], words: str
) -> None:
    notes: list[str] = []
    pool = start(answer, 1, notes)
    for number in (1, 3, 1):
        pool.submit(number)
    assert pool.receive() == 1
    with pytest.raises(DataError) as caught:
        pool.receive()
    assert len(notes) == 2
    text = str(caught.value)
    assert text.startswith("data workers died 3 times without a batch in between (the last, proc")
    assert words in text
    assert text.endswith("Or prepare batches in the trainer: data.num_workers=0.")


def test_deaths_between_answers_do_not_add_up(start: Start) -> None:
    notes: list[str] = []
    pool = start(double, 1, notes)
    for number in range(4):
        kill(multiprocessing.active_children()[0])
        pool.submit(number)
        assert pool.receive() == 2 * number
    assert len(notes) == 4


@pytest.mark.parametrize("is_up", [False, True])
def test_signals_to_the_whole_group_leave_the_workers_to_the_trainer(
    start: Start, is_up: bool
) -> None:
    notes: list[str] = []
    pool = start(double, 2, notes)
    for number in range(2 * is_up):
        pool.submit(number)
        pool.receive()
    workers = multiprocessing.active_children()
    for worker in workers:
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(worker.pid or 0, number)
    for number in range(6):
        pool.submit(number)
    assert pool.num_pending == 6
    assert [pool.receive() for _ in range(6)] == [0, 2, 4, 6, 8, 10]
    assert pool.num_pending == 0
    assert notes == []
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()  # the trainer still hears


def test_what_a_worker_raises_is_raised_here(start: Start) -> None:
    pool = start(picky, 2, [])
    for number in range(4):
        pool.submit(number)
    assert [pool.receive(), pool.receive()] == [0, 1]
    with pytest.raises(KeyError, match="two is not served") as caught:
        pool.receive()
    assert "worker_answers.py" in "".join(caught.value.__notes__)  # where in the worker
    assert pool.receive() == 3


# -- the loader ---------------------------------------------------------------------------------

SHAPE: dict[str, Any] = {"seq_len": 64, "batch_size": 4, "packing": PackingConfig(), "seed": 5}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TokenStore:
    monkeypatch.setattr("ultrathink.data.loader._BLOCK_TOKENS", 4 * 4 * 64)
    return store_of(tmp_path / "store", [f"document {number} " * 20 for number in range(200)])


@pytest.fixture
def loader(store: TokenStore) -> Iterator[TrainLoader]:
    working = TrainLoader([store], [1.0], num_workers=2, **SHAPE)
    yield working
    working.close()
    assert multiprocessing.active_children() == []


def take(loader: TrainLoader, num_batches: int) -> list[list[int]]:
    batches = [loader.next_batch() for _ in range(num_batches)]
    return [row for batch in batches for row in batch.input_ids.tolist()]


def test_training_continues_with_the_same_samples_when_workers_are_killed(
    store: TokenStore, loader: TrainLoader
) -> None:
    alone = TrainLoader([store], [1.0], **SHAPE)
    expected = take(alone, 25)
    alone.skip(11)
    expected += take(alone, 35)
    got = take(loader, 5)
    assert loader.take_notes() == []
    first, second = multiprocessing.active_children()
    kill(first)
    # The trainer is in the middle of a step: nothing may be raised there.
    assert signal.getsignal(signal.SIGCHLD) in (signal.SIG_DFL, None)
    got += take(loader, 20)
    [note] = loader.take_notes()
    assert note.startswith(f"a data worker (process {first.pid}) was killed by SIGKILL and was")
    kill(second)
    for worker in multiprocessing.active_children():
        kill(worker)
    loader.skip(11)
    got += take(loader, 35)
    assert got == expected
    assert len(loader.take_notes()) == 2
    assert loader.take_notes() == []


def test_workers_do_without_torch() -> None:
    script = "import sys, ultrathink.data.packing as _, ultrathink.data.workers as _; "
    script += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, cwd=ROOT)
    assert done.stdout.split() == [b"False"]


def test_a_store_that_vanished_is_named_and_the_cursor_stays(
    store: TokenStore, loader: TrainLoader, tmp_path: Path
) -> None:
    expected = take(TrainLoader([store], [1.0], **SHAPE), 60)
    got = take(loader, 4)
    shutil.copytree(store.folder, tmp_path / "copy")
    shutil.rmtree(store.folder)
    for worker in multiprocessing.active_children():
        kill(worker)

    def take_all() -> None:
        for _ in range(56):
            got.extend(take(loader, 1))

    with pytest.raises(DataError, match="the token cache of texts was complete when it was opened"):
        take_all()
    assert multiprocessing.active_children() == []
    (tmp_path / "copy").rename(store.folder)
    got += take(loader, 60 - len(got) // 4)
    assert got == expected


def test_after_a_failed_read_the_same_samples_come(
    store: TokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = take(TrainLoader([store], [1.0], **SHAPE), 9)
    alone = TrainLoader([store], [1.0], **SHAPE)
    got = take(alone, 4)

    def failing(*_: object) -> None:
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(SampleReader, "read", failing)
        with pytest.raises(OSError, match="the disk is gone"):
            alone.next_batch()
    assert got + take(alone, 5) == expected


# -- the trainer dies ---------------------------------------------------------------------------

SCRIPT = """
import multiprocessing, sys, time
from pathlib import Path
from ultrathink.config.data import PackingConfig
from ultrathink.data.cache import TokenStore
from ultrathink.data.loader import TrainLoader
store = TokenStore(Path(sys.argv[1]), "texts")
loader = TrainLoader([store], [1.0], seq_len=64, batch_size=4, packing=PackingConfig(), seed=5,
                     num_workers=2)
loader.next_batch()
print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
if sys.argv[2] == "wait":
    time.sleep(600)
"""


def is_running(pid: int) -> bool:
    """Whether a process is there and not just waiting to be forgotten by its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("ending", ["wait", "exit"])
def test_workers_end_with_the_trainer(store: TokenStore, ending: str) -> None:
    trainer = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(store.folder), ending],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        assert trainer.stdout is not None
        pids = [int(pid) for pid in trainer.stdout.readline().split()]
        assert len(pids) == 2
        if ending == "wait":
            assert all(is_running(pid) for pid in pids)
            trainer.kill()  # no chance to stop them
            assert trainer.wait(20) == -signal.SIGKILL
        else:
            assert trainer.wait(20) == 0  # without loader.close()
        until(lambda: not any(is_running(pid) for pid in pids))
    finally:
        trainer.kill()
        trainer.communicate()
