"""Speed of products, memory and disk, and how busy other processes keep the cores meanwhile."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.benchmark import Timer

from ultrathink.insight.doctor.machine import attempt, nearest_folder
from ultrathink.training.hardware import DTYPES, Precision
from ultrathink.training.pace import core_use

_SECONDS_PER_RATE = 0.2
# The size of products doubles until one takes long enough for its threads to pay.
_LONG_ENOUGH_S = 0.004
_SMALLEST, _LARGEST = 256, 8192
_COPIED_BYTES = 256 * 2**20  # larger than any cache
_WRITTEN_BYTES = 64 * 2**20
_DISK_SECONDS = 0.6
_MOST_WRITES = 5
_SHORTEST_WATCH_S = 0.25  # the system counts hundredths of a second


@dataclass(frozen=True)
class ProductRate:
    """Speed of matrix products in one number format."""

    precision: Precision
    threads: int | None  # None on a GPU
    flops: float  # FLOP/s, the median of several products


@dataclass(frozen=True)
class Speed:
    """What was measured on one device."""

    products: tuple[ProductRate, ...]
    memory: float | None  # bytes read and written a second by copying a large tensor

    def rate(self, precision: Precision, threads: int | None) -> float | None:
        """FLOP/s with ``threads``, None where it was not measured."""
        found = [r.flops for r in self.products if (r.precision, r.threads) == (precision, threads)]
        return found[0] if found else None


@dataclass(frozen=True)
class Sharing:
    """How busy others kept the cores of this process while it measured."""

    seconds: float
    others: float  # cores that other processes kept busy, on average
    stolen: float  # cores that the host of a virtual machine gave to others, on average


def measure_speed(device: torch.device, threads: Sequence[int]) -> Speed:
    """Measure ``device``; a CPU with each number of ``threads``."""
    precisions: list[Precision] = ["fp32", "bf16"]
    if device.type != "mps":  # which has no fp64
        precisions.append("fp64")
    products = [
        ProductRate(precision, count, _product_flops(precision, device, count))
        for precision in precisions
        for count in (threads if device.type == "cpu" else (None,))
    ]
    return Speed(tuple(products), attempt(lambda: _copy_rate(device)))


def _product_flops(precision: Precision, device: torch.device, threads: int | None) -> float:
    size = _SMALLEST
    while True:
        left, right = (
            torch.randn(size, size, device=device).to(DTYPES[precision]) for _ in range(2)
        )
        timer = _timer("torch.mm(left, right)", threads, left=left, right=right)
        if size == _LARGEST or timer.timeit(1).median >= _LONG_ENOUGH_S:
            return 2 * size**3 / _median_s(timer)
        size *= 2


def _copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written."""
    source = torch.ones(_COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    timer = _timer("target.copy_(source)", None, source=source, target=target)
    return 2 * source.nbytes / _median_s(timer)


def _timer(statement: str, threads: int | None, **tensors: torch.Tensor) -> Timer:
    count = torch.get_num_threads() if threads is None else threads
    return Timer(statement, globals=tensors, num_threads=count)


def _median_s(timer: Timer) -> float:
    return float(timer.blocked_autorange(min_run_time=_SECONDS_PER_RATE).median)


def disk_rate(folder: Path, size_bytes: int = _WRITTEN_BYTES) -> float | None:
    """Bytes a second that are written to the disk of ``folder`` and flushed; nothing stays there.

    None where the disk has no room for a trial, or nothing can be written.
    """
    content = np.random.default_rng(0).bytes(size_bytes)  # which no disk can compress
    taken: list[float] = []
    try:
        with tempfile.TemporaryFile(dir=nearest_folder(folder)) as file:
            while len(taken) < _MOST_WRITES and sum(taken) < _DISK_SECONDS:
                file.seek(0)
                file.truncate()
                start = time.perf_counter()
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                taken.append(time.perf_counter() - start)
    except OSError:
        return None
    return size_bytes / statistics.median(taken)


class CoreWatch:
    """Measures how busy other processes keep the cores of this one, from its construction on."""

    def __init__(self) -> None:
        self._start = attempt(core_use)

    def wait(self) -> None:
        """Sleep until enough time has passed for a result."""
        if self._start is not None:
            left = self._start.time_s + 1.1 * _SHORTEST_WATCH_S - time.monotonic()
            time.sleep(max(0.0, left))

    def result(self) -> Sharing | None:
        """The averages so far; None where the system does not report them, or it is too early."""
        start, now = self._start, attempt(core_use)
        if start is None or now is None or now.time_s - start.time_s < _SHORTEST_WATCH_S:
            return None
        seconds = now.time_s - start.time_s
        others = now.all_s - start.all_s - (now.own_s - start.own_s)
        stolen = now.stolen_s - start.stolen_s
        return Sharing(seconds, max(0.0, others / seconds), max(0.0, stolen / seconds))
