"""The resources of a run: memory, and time per step, including time spent waiting for data."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from ultrathink.orchestrator.detectors.base import Detector
from ultrathink.orchestrator.events import Finding
from ultrathink.orchestrator.signals import Signals
from ultrathink.orchestrator.windows import Window, median

PRESSURE = (0.92, 0.97)  # of the limit
LEAK_SPANS = 8  # consecutive spans, each higher than the one before
LEAK_SPAN = 16  # observed steps
LEAK = 0.1  # growth over all spans
STEADY = 0.7  # growth in the last half, relative to the first: caches fill up and stop growing
FRAGMENTED = 0.4  # share of the reserved memory that is not in use
USUAL = 128  # observed steps
RECENT = 16
SLOW = 0.6  # of the usual speed
SLOWEST_USUAL = (0.9, 1.1)  # a quantile of the usual times, and a factor of it
STALLED = 10.0  # a single step, in times of the usual duration
WAITING = 0.3  # of a step's time
IN_A_ROW = 8


class Memory(Detector):
    """Finds memory that is nearly full, keeps growing, or is reserved but unused."""

    remembered = ("_used", "_num_steps", "_num_fragmented")

    def __init__(self) -> None:
        self._used = Window(LEAK_SPANS * LEAK_SPAN)
        self._num_steps = 0
        self._num_fragmented = 0

    def observe(self, signals: Signals) -> Iterator[Finding]:
        used, limit = signals.finite("memory"), signals.finite("memory_limit")
        reserved = signals.finite("memory_reserved")
        if used is None or used <= 0:
            return
        # Memory that the allocator has reserved but does not use can be released.
        peak = max(used, signals.finite("memory_peak") or 0.0)
        if limit and peak > PRESSURE[0] * limit:
            severity = "high" if peak > PRESSURE[1] * limit else "medium"
            text = f"{peak:.2f} of {limit:.2f} GiB of memory are in use"
            figures = {"memory": peak, "limit": limit}
            yield Finding(signals.step, "memory_pressure", severity, text, figures)
        yield from self._leak(signals.step, used, limit)
        if reserved:
            yield from self._fragmentation(signals.step, used, reserved, limit)

    def rewind(self, step: int) -> None:
        self._used.clear()

    def _leak(self, step: int, used: float, limit: float | None) -> list[Finding]:
        self._used.add(used)
        self._num_steps += 1
        if len(self._used) < self._used.size or self._num_steps % LEAK_SPAN:
            return []
        levels = np.median(self._used.values.reshape(LEAK_SPANS, LEAK_SPAN), axis=1)
        grown = np.diff(levels)
        share = float(levels[-1] / levels[0] - 1)
        if grown.min() <= 0 or share < LEAK or grown.max() > 4 * np.median(grown):
            return []
        if grown[-3:].sum() < STEADY * grown[:3].sum():
            return []
        rate = float(np.median(grown)) / LEAK_SPAN
        text = f"memory keeps growing: {levels[0]:.2f} to {levels[-1]:.2f} GiB in "
        text += f"{self._used.size} logged steps"
        severity = "medium"
        if limit:
            left = (limit - used) / rate
            text += f"; at this rate the {limit:.2f} GiB are full after {left:,.0f} more"
            severity = "high" if left < 10 * self._used.size else "medium"
        figures = {"memory": used, "per_step": rate, "grown": share}
        return [Finding(step, "memory_leak", severity, text, figures, pause=2 * LEAK_SPAN)]

    def _fragmentation(
        self, step: int, used: float, reserved: float, limit: float | None
    ) -> list[Finding]:
        idle = 1 - used / reserved
        is_scarce = limit is not None and reserved > 0.8 * limit
        self._num_fragmented = self._num_fragmented + 1 if idle > FRAGMENTED and is_scarce else 0
        if self._num_fragmented < IN_A_ROW:
            return []
        text = f"{idle:.0%} of the {reserved:.2f} GiB reserved are unused, and memory is scarce"
        figures = {"memory": used, "reserved": reserved}
        return [Finding(step, "memory_fragmentation", "medium", text, figures)]


class Throughput(Detector):
    """Finds a lasting loss of speed, single steps that stall, and steps that wait for data."""

    remembered = ("_times", "_num_waiting")

    def __init__(self) -> None:
        self._times = Window(USUAL + RECENT)  # relative: only ratios matter
        self._num_waiting = 0

    def observe(self, signals: Signals) -> Iterator[Finding]:
        seconds, wait = signals.finite("step_time"), signals.finite("data_wait")
        speed = signals.finite("tokens_per_sec")
        taken = 1 / speed if speed else seconds  # batches may differ in size
        if taken is not None and 0 < taken < math.inf:
            yield from self._speed(signals.step, taken)
        if wait is not None and seconds is not None and seconds > 0:
            share = wait / seconds
            self._num_waiting = self._num_waiting + 1 if share > WAITING else 0
            if self._num_waiting >= IN_A_ROW:
                text = f"steps spend {share:.0%} of their time waiting for data"
                figures = {"data_wait": wait, "step_time": seconds}
                yield Finding(signals.step, "starving_loader", "medium", text, figures)

    def rewind(self, step: int) -> None:
        self._num_waiting = 0

    def _speed(self, step: int, taken: float) -> list[Finding]:
        self._times.add(taken)
        times = self._times.values
        before = times[:-RECENT]
        if len(before) < 2 * RECENT:
            return []
        usual = median(before)
        if taken * SLOW <= usual:
            return []
        recent = median(times[-RECENT:])
        figures = {"recent": recent, "usual": usual, "ratio": usual / recent}
        # Some runs regularly have slow steps: for evaluation, checkpoints, or other processes.
        quantile, times_that = SLOWEST_USUAL
        if recent * SLOW > usual and recent > times_that * np.quantile(before, quantile):
            text = f"the speed has fallen to {usual / recent:.0%} of its usual value"
            return [Finding(step, "throughput_drop", "medium", text, figures)]
        if taken > STALLED * usual:
            text = f"one step took {taken / usual:.0f} times as long as usual"
            return [Finding(step, "slow_step", "info", text, {"ratio": taken / usual})]
        return []
