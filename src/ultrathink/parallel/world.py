"""The processes of a run, and the few words that they exchange beside gradients.

Rank 0 decides and speaks; what it says is plain values as JSON, never pickled. A run of one process
has a world of its own, in which every exchange is free and nothing of ``torch.distributed`` is
touched.
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

# Where the launcher lets processes of one machine meet: a file, so that none of them listens for
# it. Without it they meet as torchrun's do, by MASTER_ADDR.
RENDEZVOUS_VARIABLE = "ULTRATHINK_RENDEZVOUS"
# Where a launcher lets the first process leave the path of its run, for a start after a crash.
RUN_POINTER_VARIABLE = "ULTRATHINK_RUN_POINTER"
# A collective that takes longer has failed; the watchdog of a hung process is quicker.
_COLLECTIVE_TIMEOUT = timedelta(hours=2)
_FAILED, _STATUS = "ultrathink/failed", "ultrathink/status"
_STATUS_WAIT = timedelta(seconds=5)


class PeerFailedError(RuntimeError):
    """Another process of the run failed; it tells why, this one only ends."""


@dataclass(frozen=True)
class Group:
    """Processes that add up what each has a part of; this one is ``rank`` of ``size``."""

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
        """``values``, of one shape on every process, summed over all of them, on their device."""
        if self.size == 1:
            return values
        assert self.size == dist.get_world_size(), "a part of the world has no channel of its own"
        total = values.clone()
        dist.all_reduce(total)
        return total


@dataclass(frozen=True)
class World(Group):
    """All processes of a run, whatever they divide among them (``ParallelDims`` says what)."""

    local_rank: int = 0  # among those of this machine
    local_size: int = 1  # how many those are

    @property
    def is_main(self) -> bool:
        """Whether this process decides and speaks."""
        return self.rank == 0

    def from_main(self, value: Any = None) -> Any:
        """The ``value`` of rank 0, anything that JSON knows, on every process."""
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
        """The ``figure`` of rank 0, where each process has measured another."""
        return self.sums([figure if self.is_main else 0.0])[0]

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.sums([0.0])

    def main_first(self, act: Callable[[], T]) -> T:
        """``act()`` on the first process of each machine, then on all others.

        For what fills a cache. Where it fails on one, that one raises, the others PeerFailedError.
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
        """Raise ``error`` where it arose, and PeerFailedError everywhere else.

        Where several processes failed, the one of the lowest rank speaks.
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
    """The world that this process was started in: as torchrun tells it, else of one process.

    The first call meets the other processes.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))  # not said: all on this machine
    if not dist.is_initialized():
        meeting = os.environ.get(RENDEZVOUS_VARIABLE)
        if meeting:  # each start meets at a file of its own
            meeting += f"-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        has_gpus = torch.cuda.is_available()
        if has_gpus:
            torch.cuda.set_device(local_rank)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if has_gpus else "gloo",
            init_method=f"file://{meeting}" if meeting else "env://",
            rank=rank,
            world_size=size,
            timeout=_COLLECTIVE_TIMEOUT,
        )
    return World(rank, size, local_rank, local_size)


def leave_world() -> None:
    """Part from the other processes, at the end of a command, once all are at its end."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def is_first_to_fail(world: World) -> bool:
    """Whether this process, which fails, is the first of its world; the others end in silence."""
    if world.size == 1 or not dist.is_initialized():
        return True
    store = dist.distributed_c10d._get_default_store()
    try:
        first = store.compare_set(_FAILED, "", str(world.rank))
    except RuntimeError:  # its keeper is gone, so it failed before
        return False
    return first.decode() == str(world.rank)


def leave_status(world: World, status: int) -> None:
    """Tell the others what the first process to fail ends with."""
    if world.size > 1 and dist.is_initialized():
        with suppress(RuntimeError):  # the keeper of such words is gone
            dist.distributed_c10d._get_default_store().set(_STATUS, str(status))


def status_of_first(world: World) -> int | None:
    """What the first process to fail ended with; None where it was not heard of in five seconds.

    Whoever ends in silence ends with the same: a launcher that hears of this process sooner must
    not take it for one that lost the others and starts again what was a mistake of the user's.
    """
    if world.size == 1 or not dist.is_initialized():
        return None
    store = dist.distributed_c10d._get_default_store()
    try:
        store.wait([_STATUS], _STATUS_WAIT)
        return int(store.get(_STATUS))
    except RuntimeError:
        return None


def is_lost_connection(error: BaseException) -> bool:
    """Whether ``error`` says that another process did not answer any more."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and ("gloo" in str(error) or "NCCL" in str(error))


def check_same(world: World, what: str, values: dict[str, Any], advice: str) -> None:
    """UltrathinkError on rank 0 where ``values`` (by name) are not the same on every process."""
    everyones = world.gathered(values)
    error = None
    for rank, theirs in enumerate(everyones):
        keys = sorted({*values, *theirs})
        differing = [key for key in keys if everyones[0].get(key, ...) != theirs.get(key, ...)]
        if differing and error is None:
            key = differing[0]
            error = UltrathinkError(
                f"process {rank} was started with another {what} than process 0: {key} is "
                f"{theirs.get(key)!r} there and {everyones[0].get(key)!r} here"
                f"{f', and {len(differing) - 1} more differ' if len(differing) > 1 else ''}. "
                f"{advice}"
            )
    world.raise_together(error if world.is_main else None)
