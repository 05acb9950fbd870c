"""Processes that wait for tasks: started once, so that a test costs no start of an interpreter."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TASK_S = 120.0  # a task that takes longer has hung


class Pool:
    """``size`` processes of one world; ``run`` lets all of them call one function."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        meeting = str(Path(self._folder.name) / "meeting")
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, meeting, theirs))
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def run(self, task: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``task(*args)`` returns in each process, by rank.

        ``task`` is a function of a module. Where it raises, the first rank's error is raised here
        with its trace.
        """
        for connection in self._connections:
            connection.send((task, args))
        answers = []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(TASK_S):
                raise AssertionError(f"process {rank} did not answer within {TASK_S:g} s")
            answers.append(connection.recv())
        failures = [answer for answer in answers if answer[0] == "raised"]
        if failures:
            error: BaseException = failures[0][1]
            error.add_note(failures[0][2])
            raise error
        return [answer[1] for answer in answers]

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()


def _serve(rank: int, size: int, meeting: str, connection: Connection) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        ULTRATHINK_RENDEZVOUS=meeting,
        GLOO_SOCKET_IFNAME="lo",
    )
    warnings.simplefilter("error")  # as in the tests themselves
    import torch

    from ultrathink.parallel.world import join_world, leave_world

    torch.set_num_threads(1)
    join_world()
    while True:
        try:
            task, args = connection.recv()
        except EOFError:
            break
        try:
            answer: tuple[Any, ...] = ("returned", task(*args))
        except BaseException as error:
            answer = ("raised", error, traceback.format_exc())
        connection.send(answer)
    leave_world()
