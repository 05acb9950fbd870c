"""Processes that answer requests in order, and are restarted when one dies.

Each worker has its own pipes. When it dies, even in the middle of an answer, the pipe ends, and
its requests go to the process that replaces it. Nothing is shared that a dying process could leave
locked, and no signal interrupts the trainer.
"""

from __future__ import annotations

import atexit
import multiprocessing
import queue
import signal
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, Generic, TypeVar

from ultrathink.core.errors import DataError

Request = TypeVar("Request")
Answer = TypeVar("Answer")

MAX_DEATHS = 3  # without an answer in between
_JOIN_S = 5.0
# Ctrl-C and SIGTERM may reach the whole process group. Only the trainer handles them: it finishes
# its step and saves before it stops its workers.
_FOR_THE_TRAINER = (signal.SIGINT, signal.SIGTERM)


class WorkerPool(Generic[Request, Answer]):
    """``num_workers`` processes that call ``answer`` with requests; answers arrive in order."""

    def __init__(
        self, answer: Callable[[Request], Answer], num_workers: int, notes: list[str]
    ) -> None:
        """``answer`` is pickled; ``notes`` gets a line for each worker that died."""
        self._notes = notes
        self._num_deaths = 0  # since the last answer
        self._workers = [_Worker(answer) for _ in range(num_workers)]
        self._order: deque[_Worker] = deque()  # whose answer is next
        self._next = 0
        _running.add(self)

    @property
    def num_pending(self) -> int:
        """The number of requests without an answer."""
        return len(self._order)

    def submit(self, request: Request) -> None:
        """Add a request."""
        worker = self._workers[self._next]
        self._next = (self._next + 1) % len(self._workers)
        self._order.append(worker)
        worker.submit(request)

    def receive(self) -> Answer:
        """The answer to the oldest request; raises what ``answer`` raised.

        DataError where workers die repeatedly.
        """
        worker = self._order[0]
        while True:
            try:
                answer = worker.receive()
                break
            except _WorkerDiedError as death:
                self._restart(worker, death)
        self._num_deaths = 0
        self._order.popleft()
        if isinstance(answer, _Failure):
            raise answer.error
        result: Answer = answer
        return result

    def stop(self) -> None:
        """End the processes and drop their requests."""
        _running.discard(self)
        self._order.clear()
        for worker in self._workers:
            worker.stop()

    def _restart(self, worker: _Worker, death: _WorkerDiedError) -> None:
        self._num_deaths += 1
        if self._num_deaths >= MAX_DEATHS:
            raise DataError(
                f"data workers died {MAX_DEATHS} times without a batch in between (the last, "
                f"process {death.pid}, {death.cause}). {death.advice} Or prepare batches in the "
                f"trainer: data.num_workers=0."
            )
        self._notes.append(
            f"a data worker (process {death.pid}) {death.cause} and was restarted; the samples "
            f"stay the same"
        )
        worker.restart()


class _WorkerDiedError(Exception):
    """Which process died, and how."""

    def __init__(self, process: SpawnProcess) -> None:
        super().__init__(process.name)
        self.pid = process.pid
        code = process.exitcode or 0
        self.cause = f"ended with exit code {code}"
        if code < 0:
            self.cause = f"was killed by {signal.Signals(-code).name}"
        self.advice = "Its output above may say why."
        if code == -signal.SIGKILL:
            self.advice = "Most likely the machine ran out of memory: free some of it."
        elif code == -signal.SIGBUS:
            self.advice = "Most likely the token cache was truncated while in use: resume."


class _Failure:
    """An exception of a worker, with its traceback."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        error.add_note("".join(traceback.format_exception(error)))


class _Worker:
    """One process and its pipes."""

    def __init__(self, answer: Callable[[Any], Any]) -> None:
        self._answer = answer
        self._pending: deque[Any] = deque()
        self._start()

    def submit(self, request: Any) -> None:
        self._pending.append(request)
        with suppress(OSError):  # it died, which `receive` notices
            self._requests.send(request)

    def receive(self) -> Any:
        try:
            answer = self._answers.recv()
        except (EOFError, OSError):
            self._process.join(_JOIN_S)  # it may still be ending
            self.stop()
            raise _WorkerDiedError(self._process) from None
        self._pending.popleft()
        return answer

    def restart(self) -> None:
        self._start()
        unanswered, self._pending = self._pending, deque()
        for request in unanswered:
            self.submit(request)

    def stop(self) -> None:
        self._requests.close()
        self._answers.close()
        self._process.kill()  # it only reads, so nothing is lost
        self._process.join()

    def _start(self) -> None:
        # A fork would copy the locks of tokenizer and torch threads, locked or not.
        context = multiprocessing.get_context("spawn")
        requests, self._requests = context.Pipe(duplex=False)
        self._answers, answers = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_serve, args=(self._answer, requests, answers), daemon=True
        )
        try:
            with _signals_held_back():
                self._process.start()
        except OSError as error:
            raise DataError(
                f"a data worker cannot be started ({error}). Free memory or processes, or prepare "
                f"batches in the trainer: data.num_workers=0."
            ) from error
        finally:
            # Open in the worker only, they close when it ends.
            requests.close()
            answers.close()


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Block the trainer's signals, so that a process started in here never gets them.

    The trainer gets them at the end of the block.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # starting it later would unblock the signals
    held = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_TRAINER)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _serve(
    answer: Callable[[Any], Any],
    requests: Connection[Any, Any],
    answers: Connection[Any, Any],
) -> None:
    """Answer requests until the trainer closes its pipe or ends."""
    for number in _FOR_THE_TRAINER:
        signal.signal(number, signal.SIG_IGN)
    # A thread receives the requests, so that trainer and worker never both wait to send.
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(requests, inbox), daemon=True).start()
    while (request := inbox.get()) is not None:
        try:
            result = answer(request)
        except Exception as error:
            result = _Failure(error)
        try:
            answers.send(result)
        except OSError:  # the trainer is gone
            return


def _receive(requests: Connection[Any, Any], inbox: queue.SimpleQueue[Any]) -> None:
    try:
        while True:
            inbox.put(requests.recv())
    except (EOFError, OSError):
        inbox.put(None)


_running: weakref.WeakSet[WorkerPool[Any, Any]] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    """Stop the remaining workers before Python's exit waits for them."""
    for pool in list(_running):
        pool.stop()
