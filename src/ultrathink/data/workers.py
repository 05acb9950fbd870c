"""Processes that answer requests in order, and are started again when one dies.

Each worker has pipes of its own. When it dies, however suddenly, the pipe ends, also in the
middle of an answer, and its requests go to the process that takes its place. Nothing is shared
that a dying process could leave locked, and no signal interrupts the trainer.
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
# Ctrl-C and SIGTERM may reach the whole group of processes. They are the trainer's: it finishes
# its step and saves before it stops its workers.
_FOR_THE_TRAINER = (signal.SIGINT, signal.SIGTERM)


class WorkerPool(Generic[Request, Answer]):
    """``num_workers`` processes that call ``answer`` with requests; answers come in order."""

    def __init__(
        self, answer: Callable[[Request], Answer], num_workers: int, notes: list[str]
    ) -> None:
        """``answer`` is pickled; ``notes`` are told of workers that died."""
        self._notes = notes
        self._num_deaths = 0  # since the last answer
        self._workers = [_Worker(answer) for _ in range(num_workers)]
        self._order: deque[_Worker] = deque()  # whose answer is next
        self._next = 0
        _running.add(self)

    @property
    def num_pending(self) -> int:
        """Requests that are not answered yet."""
        return len(self._order)

    def submit(self, request: Request) -> None:
        """Ask for one more answer."""
        worker = self._workers[self._next]
        self._next = (self._next + 1) % len(self._workers)
        self._order.append(worker)
        worker.submit(request)

    def receive(self) -> Answer:
        """The answer to the oldest request; what ``answer`` raised there is raised here.

        DataError where workers die again and again.
        """
        worker = self._order[0]
        while True:
            try:
                answer = worker.receive()
                break
            except _WorkerDiedError as death:
                self._start_again(worker, death)
        self._num_deaths = 0
        self._order.popleft()
        if isinstance(answer, _Failure):
            raise answer.error
        result: Answer = answer
        return result

    def stop(self) -> None:
        """End the processes; requests are forgotten."""
        _running.discard(self)
        self._order.clear()
        for worker in self._workers:
            worker.stop()

    def _start_again(self, worker: _Worker, death: _WorkerDiedError) -> None:
        self._num_deaths += 1
        if self._num_deaths >= MAX_DEATHS:
            raise DataError(
                f"data workers died {MAX_DEATHS} times without a batch in between (the last, "
                f"process {death.pid}, {death.cause}). {death.advice} Or let the trainer prepare "
                f"its batches itself: data.num_workers=0."
            )
        self._notes.append(
            f"a data worker (process {death.pid}) {death.cause}; it was started again, and the "
            f"samples stay the same"
        )
        worker.start_again()


class _WorkerDiedError(Exception):
    """Which process ended, and how."""

    def __init__(self, process: SpawnProcess) -> None:
        super().__init__(process.name)
        self.pid = process.pid
        code = process.exitcode or 0
        self.cause = f"ended with exit code {code}"
        if code < 0:
            self.cause = f"was killed by {signal.Signals(-code).name}"
        self.advice = "What it printed above may say why."
        if code == -signal.SIGKILL:
            self.advice = "Most likely the machine ran out of memory: free some of it."
        elif code == -signal.SIGBUS:
            self.advice = "Most likely the token cache was cut short while in use: resume."


class _Failure:
    """What was raised in a worker, with the place where."""

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
        with suppress(OSError):  # it died; whoever waits for the answer notices
            self._requests.send(request)

    def receive(self) -> Any:
        try:
            answer = self._answers.recv()
        except (EOFError, OSError):
            self._process.join(_JOIN_S)  # it may still be on its way out
            self.stop()
            raise _WorkerDiedError(self._process) from None
        self._pending.popleft()
        return answer

    def start_again(self) -> None:
        self._start()
        unanswered, self._pending = self._pending, deque()
        for request in unanswered:
            self.submit(request)

    def stop(self) -> None:
        self._requests.close()
        self._answers.close()
        self._process.kill()  # it only reads: there is nothing to lose
        self._process.join()

    def _start(self) -> None:
        # A fork would copy the locks of tokenizer and torch threads in whatever state.
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
                f"a data worker cannot be started ({error}). Free memory or processes, or let the "
                f"trainer prepare its batches itself: data.num_workers=0."
            ) from error
        finally:
            # Held by the worker alone, they end with it.
            requests.close()
            answers.close()


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """A process started in here never gets the trainer's signals, not even before it is up.

    The trainer itself gets them a moment later.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # would be started first, and let the signals through again
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
    """What a worker does until the trainer closes its pipe or ends."""
    for number in _FOR_THE_TRAINER:
        signal.signal(number, signal.SIG_IGN)
    # A thread of its own takes requests in, so that the trainer never waits to hand one over
    # while this waits to hand over an answer.
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_take_in, args=(requests, inbox), daemon=True).start()
    while (request := inbox.get()) is not None:
        try:
            result = answer(request)
        except Exception as error:
            result = _Failure(error)
        try:
            answers.send(result)
        except OSError:  # the trainer is gone
            return


def _take_in(requests: Connection[Any, Any], inbox: queue.SimpleQueue[Any]) -> None:
    try:
        while True:
            inbox.put(requests.recv())
    except (EOFError, OSError):
        inbox.put(None)


_running: weakref.WeakSet[WorkerPool[Any, Any]] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    """Stop what was not stopped before Python's own end would wait for it."""
    for pool in list(_running):
        pool.stop()
