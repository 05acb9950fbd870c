"""The processes of a run, and what they exchange apart from gradients.

Rank 0 decides and prints; values are exchanged as JSON, never pickled. In a run of one process
every exchange is trivial and ``torch.distributed`` is not used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ultrathink.core.errors import UltrathinkError

T = TypeVar("T")

# The file at which the launcher lets the processes of one machine rendezvous, so that nothing
# listens on the network. Without it they rendezvous like torchrun's, by MASTER_ADDR.
RENDEZVOUS_VARIABLE = "ULTRATHINK_RENDEZVOUS"
# The file in which the first process records the path of its run, for a restart after a crash.
RUN_POINTER_VARIABLE = "ULTRATHINK_RUN_POINTER"
# A collective that takes longer has failed; the watchdog of a hung process acts earlier.
_COLLECTIVE_TIMEOUT = timedelta(hours=2)
_FAILED, _STATUS = "ultrathink/failed", "ultrathink/status"
_STATUS_WAIT = timedelta(seconds=5)


class PeerFailedError(RuntimeError):
    """Another process of the run failed, and reports why; this one only ends."""


@dataclass(frozen=True)
class Group:
    """Processes that sum values; this one is ``rank`` of ``size``."""

    rank: int = 0
    size: int = 1

    def sums(self, values: Sequence[float]) -> list[float]:
        """Each of ``values`` summed over all processes, in float64."""
        if self.size == 1:
            return [float(value) for value in values]
        total = self.summed(torch.tensor(values, dtype=torch.float64))
        summed: list[float] = total.tolist()
        return summed

    def summed(self, values: Tensor) -> Tensor:
        """``values``, of equal shape on every process, summed over all of them, on their device."""
        if self.size == 1:
            return values
        assert self.size == dist.get_world_size(), "there are no smaller process groups yet"
        total = values.clone()
        dist.all_reduce(total)
        return total


@dataclass(frozen=True)
class World(Group):
    """All processes of a run; ``ParallelDims`` says what they divide among them."""

    local_rank: int = 0  # on this machine
    local_size: int = 1  # number of processes on this machine

    @property
    def is_main(self) -> bool:
        """Whether this process decides and prints."""
        return self.rank == 0

    def from_main(self, value: Any = None) -> Any:
        """The ``value`` of rank 0, plain JSON, on every process."""
        return self.gathered(value if self.is_main else None)[0]

    def gathered(self, value: Any) -> list[Any]:
        """The ``value`` of every process, by rank."""
        if self.size == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        length = torch.zeros(self.size, dtype=torch.int64)
        length[self.rank] = len(text)
        dist.all_reduce(length)
        padded = torch.zeros(int(length.max()), dtype=torch.uint8)
        padded[: len(text)] = text
        everyones = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(everyones, padded)
        return [
            json.loads(one[:size].numpy().tobytes())
            for one, size in zip(everyones, length.tolist(), strict=True)
        ]

    def of_main(self, figure: float) -> float:
        """The ``figure`` of rank 0, on every process."""
        return self.sums([figure if self.is_main else 0.0])[0]

    def barrier(self) -> None:
        """Wait for every process."""
        self.sums([0.0])

    def main_first(self, act: Callable[[], T]) -> T:
        """``act()`` on the first process of each machine, then on all others.

        For work that fills a cache. If it fails on one process, the others raise PeerFailedError.
        """
        if self.size == 1:
            return act()
        result: T | None = None
        for is_turn in (self.local_rank == 0, self.local_rank != 0):
            error: Exception | None = None
            if is_turn:
                try:
                    result = act()
                except Exception as caught:
                    error = caught
            self.raise_together(error)
        assert result is not None
        return result

    def raise_together(self, error: Exception | None) -> None:
        """Raise ``error`` on its process, and PeerFailedError on all others.

        If several processes failed, the one of the lowest rank raises its error.
        """
        failures = self.sums([float(error is not None)])[0]
        if not failures:
            return
        ranks = [rank for rank, failed in enumerate(self.gathered(error is not None)) if failed]
        if error is not None and self.rank == ranks[0]:
            raise error
        raise PeerFailedError(f"process {ranks[0]} failed")


ALONE = World()


def join_world() -> World:
    """The world of this process: from torchrun's environment, else a single process.

    The first call connects to the other processes.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))  # by default all on this machine
    if not dist.is_initialized():
        rendezvous = os.environ.get(RENDEZVOUS_VARIABLE)
        if rendezvous:  # a separate file for each restart
            rendezvous += f"-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        has_gpus = torch.cuda.is_available()
        if has_gpus:
            torch.cuda.set_device(local_rank)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if has_gpus else "gloo",
            init_method=f"file://{rendezvous}" if rendezvous else "env://",
            rank=rank,
            world_size=size,
            timeout=_COLLECTIVE_TIMEOUT,
        )
    return World(rank, size, local_rank, local_size)


def leave_world() -> None:
    """Disconnect from the other processes, once all are at the end of their command."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _shared_store(world: World) -> Any:
    """The store of all processes; None in a run of one."""
    if world.size == 1 or not dist.is_initialized():
        return None
    return dist.distributed_c10d._get_default_store()


def is_first_to_fail(world: World) -> bool:
    """Whether this process is the first to fail; the others then end without a message."""
    store = _shared_store(world)
    if store is None:
        return True
    try:
        first: bytes = store.compare_set(_FAILED, "", str(world.rank))
    except RuntimeError:  # the process that hosts the store is gone, so it failed before
        return False
    return first.decode() == str(world.rank)


def leave_status(world: World, status: int) -> None:
    """Publish the exit status of the first process to fail."""
    store = _shared_store(world)
    if store is not None:
        with suppress(RuntimeError):  # the process that hosts the store is gone
            store.set(_STATUS, str(status))


def status_of_first(world: World) -> int | None:
    """The exit status of the first process to fail; None if it is not published in five seconds.

    The other processes end with the same status: a launcher that notices them first must not
    restart a run that failed by a mistake of the user.
    """
    store = _shared_store(world)
    if store is None:
        return None
    try:
        store.wait([_STATUS], _STATUS_WAIT)
        return int(store.get(_STATUS))
    except RuntimeError:
        return None


def is_lost_connection(error: BaseException) -> bool:
    """Whether ``error`` means that another process no longer responds."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and ("gloo" in str(error) or "NCCL" in str(error))


def check_same(world: World, what: str, values: dict[str, Any], advice: str) -> None:
    """Raise UltrathinkError on rank 0 if ``values`` (by name) differ between processes."""
    everyones = world.gathered(values)
    error = None
    for rank, theirs in enumerate(everyones):
        keys = sorted({*values, *theirs})
        differing = [key for key in keys if everyones[0].get(key, ...) != theirs.get(key, ...)]
        if differing and error is None:
            key = differing[0]
            error = UltrathinkError(
                f"process {rank} was started with a different {what} than process 0: {key} is "
                f"{theirs.get(key)!r} there and {everyones[0].get(key)!r} here"
                f"{f', and {len(differing) - 1} more differ' if len(differing) > 1 else ''}. "
                f"{advice}"
            )
    world.raise_together(error if world.is_main else None)
