"""The capabilities of this machine: device, number formats, peak rate, allocator."""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from ultrathink.core.errors import ConfigError

Precision = Literal["fp32", "bf16", "fp64"]
DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp64": torch.float64,
}

# Dense bf16 peak of one device in FLOP/s (NVIDIA's data sheets, without sparsity). Other devices
# are measured.
_DENSE_BF16_PEAK = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
}
# bf16 must be faster by this factor to be worth its rounding.
_BF16_ADVANTAGE = 1.5
# Names of bf16 matrix instructions (torch.cpu.get_capabilities).
_BF16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "sve_bf16", "bf16")
# Nominal FLOP/s for deterministic runs, in which a measurement would make runs differ: of one CPU
# thread with such instructions, and of a current GPU.
_NOMINAL_PER_THREAD = {"fp32": 5e10, "bf16": 2e11, "fp64": 2.5e10}
_NOMINAL_PER_GPU = {"fp32": 2e13, "bf16": 1e14, "fp64": 1e13}


def choose_device(name: str) -> torch.device:
    """The device that ``training.device`` names; ``auto`` prefers CUDA, then MPS, then the CPU."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(
            f"training.device = {name!r}: no such kind of device; use auto, cpu, cuda, cuda:1 or "
            f"mps."
        ) from None
    if device.type == "cuda" and (
        not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()
    ):
        raise ConfigError(
            f"training.device = {name!r}: this machine shows "
            f"{torch.cuda.device_count() if torch.cuda.is_available() else 'no'} CUDA devices; "
            f"use auto or cpu."
        )
    return device


def choose_precision(
    wanted: str, device: torch.device, *, measure: bool = True
) -> tuple[Precision, str]:
    """The number format of matrix products, and why.

    On a CPU ``auto`` compares measured rates; with ``measure=False`` it goes by the processor's
    instructions, so that the choice is always the same.
    """
    if wanted == "auto":
        return _best_precision(device, measure)
    if wanted == "fp64" and device.type == "mps":
        raise ConfigError("training.precision = 'fp64': MPS has no fp64; use fp32 or bf16.")
    if wanted == "bf16":
        return "bf16", "as configured"
    return ("fp64" if wanted == "fp64" else "fp32"), "as configured"


def _best_precision(device: torch.device, measure: bool) -> tuple[Precision, str]:
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "this GPU has bf16 products"
        return "fp32", "this GPU has no bf16 products"
    if device.type != "cpu":
        return "fp32", f"bf16 is not measured on {device.type}"
    if not measure:
        instructions = bf16_instructions()
        words = f"this processor has {instructions or 'no bf16'} products; not measured"
        return ("bf16" if instructions else "fp32"), words
    # On one thread: several threads wait for each other while other processes use the cores, which
    # makes the comparison random.
    fp32, bf16 = (
        measured_rate(dtype, 512, 0.06, "cpu", 1) for dtype in (torch.float32, torch.bfloat16)
    )
    words = f"bf16 products run at {bf16 / fp32:.1f} times the rate of fp32 here"
    return ("bf16" if bf16 > _BF16_ADVANTAGE * fp32 else "fp32"), words


def bf16_instructions() -> str | None:
    """The name of this CPU's bf16 matrix instructions, if torch can use them."""
    if not torch.backends.mkldnn.is_available():
        return None
    has = cpu_capabilities()
    return next((name for name in _BF16_INSTRUCTIONS if has.get(name)), None)


def cpu_capabilities() -> dict[str, Any]:
    """What torch knows about this CPU, by name; empty if the system does not report it."""
    if sys.platform == "linux":
        try:
            is_readable = Path("/proc/cpuinfo").read_bytes().strip() != b""
        except OSError:
            is_readable = False
        if not is_readable:  # torch 2.13 would crash the process
            return {}
    return dict(torch.cpu.get_capabilities())


@functools.cache
def measured_rate(
    dtype: torch.dtype,
    size: int = 512,
    seconds: float = 0.06,
    device: str = "cpu",
    threads: int | None = None,
) -> float:
    """The best rate of a square matrix product in a short trial, in FLOP/s.

    ``threads`` is the number of CPU threads, by default torch's.
    """
    with using_threads(threads):
        return 2 * size**3 / min(product_seconds(dtype, size, seconds, torch.device(device)))


def product_seconds(
    dtype: torch.dtype, size: int, seconds: float, device: torch.device
) -> list[float]:
    """The duration of each product of two square matrices in a trial of ``seconds``."""
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    torch.mm(a, b)
    synchronize(device)
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while not taken or time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b)
        synchronize(device)
        taken.append(time.perf_counter() - start)
    return taken


@contextmanager
def using_threads(count: int | None) -> Iterator[None]:
    """Let torch use this many threads inside, and the former number afterwards."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def nominal_flops(device: torch.device, precision: Precision) -> float:
    """A rate in FLOP/s that is the same in every run, for deterministic choices."""
    if device.type == "cpu":
        return _NOMINAL_PER_THREAD[precision] * torch.get_num_threads()
    return _NOMINAL_PER_GPU[precision]


def peak_flops(device: torch.device, precision: Precision) -> float:
    """The dense peak of ``device`` in FLOP/s, from the data sheet or measured."""
    if device.type == "cuda" and precision == "bf16":
        known = _DENSE_BF16_PEAK.get(torch.cuda.get_device_name(device))
        if known is not None:
            return known
    size = 8192 if device.type == "cuda" else 1024
    return measured_rate(DTYPES[precision], size, 0.15, str(device))


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


# From <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -3, -4, -8
_DEFAULT_TRIM, _DEFAULT_MMAP_MAX = 128 << 10, 65536
_LARGE = 1 << 20


def keep_freed_memory() -> bool:
    """Make glibc's allocator reuse large blocks instead of returning them to the system.

    Training frees and allocates the same large tensors in every step, and each fresh block costs
    page faults. Returns whether it took effect: other C libraries and preloaded allocators are
    left unchanged.
    """
    return _set_malloc((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1))


def return_freed_memory() -> None:
    """Return freed memory to the system, now and from now on.

    The memory that ``keep_freed_memory`` keeps is fragmented: when memory is short, a large tensor
    may not fit into any of the fragments.
    """
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
    if _set_malloc(
        (_M_MMAP_MAX, _DEFAULT_MMAP_MAX),
        (_M_MMAP_THRESHOLD, _LARGE),
        (_M_TRIM_THRESHOLD, _DEFAULT_TRIM),
    ):
        ctypes.CDLL(None).malloc_trim(0)


def forget_most_used() -> None:
    """Release free device memory, and reset the peak of the memory in use."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if _is_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def _set_malloc(*settings: tuple[int, int]) -> bool:
    """Set parameters of glibc's allocator; False if another allocator is in use."""
    if not _is_glibc():
        return False
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(name, value) == 1 for name, value in settings)


def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc" and not os.environ.get("LD_PRELOAD")
