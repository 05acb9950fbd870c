"""How fast this machine is: products, memory, disk; and who else uses its cores meanwhile."""

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

from ultrathink.insight.doctor.machine import nearest_folder, told
from ultrathink.training.hardware import (
    DTYPES,
    Precision,
    product_seconds,
    synchronize,
    using_threads,
)

# A product must take this long before its time says something; sizes double up to there.
_LONG_ENOUGH_S = 0.004
_SMALLEST, _LARGEST = 256, 8192
_SECONDS_PER_RATE = 0.2
_COPIED_BYTES = 256 * 2**20  # beyond any cache
_WRITTEN_BYTES = 64 * 2**20
_DISK_SECONDS = 0.6
_MOST_WRITES = 5
_SHORTEST_WATCH_S = 0.25  # /proc/stat counts hundredths of a second


@dataclass(frozen=True)
class ProductRate:
    """How fast matrix products of one number format are."""

    precision: Precision
    threads: int | None  # None on a GPU
    flops: float  # FLOP/s, the median of several products


@dataclass(frozen=True)
class Speed:
    """What was measured on one device; rates in bytes or FLOP a second, medians."""

    products: tuple[ProductRate, ...]
    memory: float | None  # bytes read and written a second by copying a large tensor

    def rate(self, precision: Precision, threads: int | None) -> float | None:
        """FLOP/s with so many threads, None where it was not measured."""
        found = [r.flops for r in self.products if (r.precision, r.threads) == (precision, threads)]
        return found[0] if found else None


@dataclass(frozen=True)
class Sharing:
    """What others did with the cores of this process while it was watched."""

    seconds: float
    others: float  # cores that other processes kept busy, on average
    stolen: float  # cores' worth of time that the host of a virtual machine took away


def measure_speed(device: torch.device, threads: Sequence[int]) -> Speed:
    """Rates of ``device``; on a CPU with each number of ``threads``."""
    precisions: list[Precision] = ["fp32", "bf16"]
    if device.type != "mps":  # which has no fp64
        precisions.append("fp64")
    products = []
    for precision in precisions:
        for count in threads if device.type == "cpu" else (None,):
            with using_threads(count):
                flops = product_flops(precision, device)
            products.append(ProductRate(precision, count, flops))
    return Speed(tuple(products), told(lambda: copy_rate(device)))


def product_flops(
    precision: Precision, device: torch.device, seconds: float = _SECONDS_PER_RATE
) -> float:
    """The median rate of square matrix products, in FLOP/s, of a size that suits the rate."""
    size = _SMALLEST
    while size < _LARGEST:
        taken = product_seconds(DTYPES[precision], size, 0.0, device)
        if taken[0] >= _LONG_ENOUGH_S:
            break
        size *= 2
    taken = product_seconds(DTYPES[precision], size, seconds, device)
    return 2 * size**3 / statistics.median(taken)


def copy_rate(device: torch.device, size_bytes: int = _COPIED_BYTES, repeats: int = 5) -> float:
    """Bytes a second, read and written, of copying a tensor larger than the caches."""
    source = torch.ones(size_bytes // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)  # the first pays for fresh memory
    synchronize(device)
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        taken.append(time.perf_counter() - start)
    return 2 * source.nbytes / statistics.median(taken)


def disk_rate(folder: Path, size_bytes: int = _WRITTEN_BYTES) -> float | None:
    """Bytes a second that reach the disk of ``folder``, flushed; nothing stays there.

    None where the disk has no room for a trial, or nothing can be written.
    """
    place = nearest_folder(folder)
    content = np.random.default_rng(0).bytes(4 * 2**20)  # nothing that a disk could compress
    taken: list[float] = []
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            while len(taken) < _MOST_WRITES and sum(taken) < _DISK_SECONDS:
                file.seek(0)
                file.truncate()
                start = time.perf_counter()
                for _ in range(size_bytes // len(content)):
                    file.write(content)
                file.flush()
                os.fsync(file.fileno())
                taken.append(time.perf_counter() - start)
    except OSError:
        return None
    return size_bytes / statistics.median(taken)


class CoreWatch:
    """Watches the cores that this process may use, from its making to ``result``."""

    def __init__(self, stat: Path = Path("/proc/stat")) -> None:
        self._stat = stat
        self._start = time.perf_counter()
        self._own = time.process_time()
        self._cores = told(self._read)

    def wait(self) -> None:
        """Give the time that a result needs, where less of it has passed."""
        left = 1.1 * _SHORTEST_WATCH_S - (time.perf_counter() - self._start)
        if left > 0:
            time.sleep(left)

    def result(self) -> Sharing | None:
        """What was seen; None where the system does not tell, or the time was too short."""
        seconds = time.perf_counter() - self._start
        own = time.process_time() - self._own
        now = told(self._read)
        if self._cores is None or now is None or seconds < _SHORTEST_WATCH_S:
            return None
        busy, stolen = now[0] - self._cores[0], now[1] - self._cores[1]
        return Sharing(seconds, max(0.0, (busy - own) / seconds), max(0.0, stolen / seconds))

    def _read(self) -> tuple[float, float]:
        """Seconds that the allowed cores were busy, and that were stolen from them.

        The fields of /proc/stat: user nice system idle iowait irq softirq steal, in ticks.
        """
        tick = os.sysconf("SC_CLK_TCK")
        allowed = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        busy = stolen = seen = 0
        for line in self._stat.read_text(encoding="utf-8").splitlines():
            name, *fields = line.split()
            if name in allowed:
                user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
                busy += user + nice + system + irq + softirq
                stolen += steal
                seen += 1
        if seen == 0:
            raise OSError("no core of this process is listed")
        return busy / tick, stolen / tick
