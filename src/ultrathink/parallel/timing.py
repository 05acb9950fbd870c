"""Measures how long each process computes and waits for others, and finds stragglers.

Communication is timed if it blocks the process: on CPUs everything except the gradient sums between
replicas of the model (``dp_replicate``). On GPUs it overlaps with computation and is not measured
here; use a profiler.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_collectives import (
    DefaultAllGather,
    DefaultReduceScatter,
)

from ultrathink.parallel.world import World

# A straggler computes longer than the median process by this factor ...
STRAGGLING = 1.3
# ... over this many steps: single steps differ by chance.
JUDGED_STEPS = 50


class CommunicationClock:
    """Counts the seconds that this process spends in collectives."""

    def __init__(self) -> None:
        self._seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time inside."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - began

    def take(self) -> float:
        """The seconds counted since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class TimedAllGather(DefaultAllGather):
    """FSDP's all-gather of weights, timed."""

    def __init__(self, clock: CommunicationClock) -> None:
        self.clock = clock

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, *args: Any, **options: Any):  # type: ignore[no-untyped-def]
        with self.clock.running():
            return super().__call__(output_tensor, input_tensor, *args, **options)


class TimedReduceScatter(DefaultReduceScatter):
    """FSDP's reduce-scatter of gradients, timed."""

    def __init__(self, clock: CommunicationClock) -> None:
        self.clock = clock

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, *args: Any, **options: Any):  # type: ignore[no-untyped-def]
        with self.clock.running():
            return super().__call__(output_tensor, input_tensor, *args, **options)


@dataclass(frozen=True)
class Timing:
    """Mean seconds per step over the last steps, by rank."""

    computing: tuple[float, ...]
    communicating: tuple[float, ...]
    num_steps: int = 1

    @property
    def communication_share(self) -> float:
        """The share of all processes' time spent on communication and waiting."""
        total = sum(self.computing) + sum(self.communicating)
        return sum(self.communicating) / total if total > 0 else 0.0

    def stragglers(self) -> dict[int, float]:
        """The ranks that compute much longer than the median, and by which factor."""
        middle = statistics.median_low(self.computing)
        return {
            rank: seconds / middle
            for rank, seconds in enumerate(self.computing)
            if middle > 0 and seconds > STRAGGLING * middle
        }

    def metrics(self) -> dict[str, float]:
        """The figures for metrics.jsonl."""
        return {
            "communication_share": self.communication_share,
            "compute_s_fastest": min(self.computing),
            "compute_s_slowest": max(self.computing),
        }


class StepTimes:
    """Collects the times of steps, and compares them between processes."""

    def __init__(self, world: World, clock: CommunicationClock) -> None:
        self.world = world
        self.clock = clock
        self._steps = 0
        self._computing = self._communicating = 0.0
        self._reported: set[int] = set()
        self._judged: list[Timing] = []

    def add(self, seconds: float) -> None:
        """Count a step of ``seconds``."""
        communicating = self.clock.take()
        self._steps += 1
        self._communicating += communicating
        self._computing += max(0.0, seconds - communicating)

    def compare(self) -> Timing:
        """The times of all processes since the last call; all processes call it together."""
        size, rank = self.world.size, self.world.rank
        mine = [0.0] * (2 * size)
        steps = max(1, self._steps)
        mine[rank], mine[size + rank] = self._computing / steps, self._communicating / steps
        self._steps, self._computing, self._communicating = 0, 0.0, 0.0
        everyones = self.world.sums(mine)
        return Timing(tuple(everyones[:size]), tuple(everyones[size:]), steps)

    def of_step(
        self, step: int, seconds: float, *, is_due: bool
    ) -> tuple[Timing | None, list[str]]:
        """Count ``step``; returns the timing of all processes if due, and a sentence on each new
        straggler. A run of one process has neither."""
        if self.world.size == 1:
            return None, []
        self.add(seconds)
        if step != 1 and not is_due:
            return None, []
        timing = self.compare()
        # The first step compiles, at different speeds.
        return timing, self.new_stragglers(timing) if step > 1 else []

    def new_stragglers(self, timing: Timing) -> list[str]:
        """A sentence for each process that has become a straggler.

        They are judged over ``JUDGED_STEPS`` steps, collected from consecutive ``timing``s.
        """
        self._judged.append(timing)
        num_steps = sum(each.num_steps for each in self._judged)
        if num_steps < JUDGED_STEPS:
            return []
        computing = [
            sum(each.computing[rank] * each.num_steps for each in self._judged) / num_steps
            for rank in range(len(timing.computing))
        ]
        self._judged.clear()
        slow = Timing(tuple(computing), (), num_steps).stragglers()
        sentences = [
            f"process {rank} computes {factor:.1f} times as long as the others, which wait for it"
            for rank, factor in slow.items()
            if rank not in self._reported
        ]
        self._reported = set(slow)
        return sentences
