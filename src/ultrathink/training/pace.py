"""Reports once if other processes compete for the cores while a run trains.

A training step on a CPU uses all cores and waits for the slowest thread: another job on the same
cores can make it many times slower, without any error.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

SLOW = 3.0  # times the best median of a window of steps
OTHERS = 0.25  # share of the cores that other processes use at least
CROWDED = 1.25  # threads and cores that others use, as a multiple of the cores
BUSY = 0.8  # share of the cores in use at least: otherwise there are free ones
FEWEST_STEPS = 5  # of a window
FEWEST_S = 10.0  # over which the use of the cores is measured


@dataclass(frozen=True)
class CoreUse:
    """CPU seconds used so far: by this process with its children, and by all processes.

    All processes are counted on the cores that this process may use.
    """

    time_s: float
    own_s: float
    all_s: float
    num_cores: int
    stolen_s: float = 0.0  # that the host of a virtual machine gave to others


def core_use() -> CoreUse | None:
    """The use of the cores so far; None if the system does not report it."""
    import psutil  # only while steps are slow

    try:
        own = psutil.Process()
        times = [own.cpu_times(), *(child.cpu_times() for child in own.children(recursive=True))]
        cores = _cores()
        per_core = psutil.cpu_times(percpu=True)
        busy = [core for number, core in enumerate(per_core) if number in cores]
    except (psutil.Error, OSError):
        return None
    all_s = sum(core.user + core.system + getattr(core, "nice", 0.0) for core in busy)
    own_s = sum(t.user + t.system for t in times)
    stolen_s = sum(getattr(core, "steal", 0.0) for core in busy)
    return CoreUse(time.monotonic(), own_s, all_s, len(busy), stolen_s)


def _cores() -> set[int]:
    everything = range(os.cpu_count() or 1)
    return set(os.sched_getaffinity(0) if sys.platform == "linux" else everything)


class Pace:
    """Looks for competing processes when a run begins, and when its steps become much slower.

    ``local_size`` is the number of processes of the run on this machine, which use equal shares of
    the cores. ``measure`` returns the use of the cores; it is called only in the first seconds and
    while steps are slow.
    """

    def __init__(
        self, local_size: int = 1, measure: Callable[[], CoreUse | None] = core_use
    ) -> None:
        self._local_size = local_size
        self._measure = measure
        self._seconds: list[float] = []
        self._best: float | None = None  # median of a window
        self._before: CoreUse | None = None  # at the start of what is judged
        self._is_first = True  # the run was not judged yet
        self._is_done = False

    def of_step(self, seconds: float, *, is_logged: bool) -> list[str]:
        """Count a step; at a logged one returns a warning, once, if others slow the run down."""
        if self._is_done:
            return []
        self._seconds.append(seconds)
        if not is_logged or len(self._seconds) < FEWEST_STEPS:
            return []
        median = statistics.median(self._seconds)
        self._seconds.clear()
        best = self._best or median
        is_slow = median >= SLOW * best
        if not is_slow:
            self._best = min(median, best)
        if not is_slow and not self._is_first:
            self._before = None
            return []
        now = self._measure()
        if now is None:
            self._is_done = True
        elif self._before is None:
            self._before = now
        elif now.time_s - self._before.time_s >= FEWEST_S:
            before, self._before, self._is_first = self._before, now, False
            return self._judge(before, now, median, best if is_slow else None)
        return []

    def _judge(self, before: CoreUse, now: CoreUse, median: float, best: float | None) -> list[str]:
        """The warning, if others compete; ``best`` is the pace before, if steps became slow."""
        seconds, num_threads = now.time_s - before.time_s, torch.get_num_threads()
        own = self._local_size * (now.own_s - before.own_s) / seconds
        busy = (now.all_s - before.all_s) / seconds
        others = busy - own
        if others < OTHERS * now.num_cores or busy < BUSY * now.num_cores:
            return []
        # Without a faster pace to compare with: only if threads have to wait for each other.
        if best is None and self._local_size * num_threads + others < CROWDED * now.num_cores:
            return []
        self._is_done = True
        threads = max(1, round(now.num_cores - others))
        fewer = f", or resume with OMP_NUM_THREADS={threads}" if threads < num_threads else ""
        slow = "this run's threads wait for each other"
        if best is not None:
            slow = (
                f"steps take {median / best:.0f} times as long as before ({median:.3g} s instead "
                f"of {best:.3g} s)"
            )
        return [
            f"{slow}, and other processes use {others:.1f} of the {now.num_cores} cores: stop "
            f"them, or wait for them{fewer}"
        ]
