"""How much memory a run takes, and how much there is."""

from __future__ import annotations

import os
import resource
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

_GIB = 2**30
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory_in_use() -> dict[str, float]:
    """GiB in use (``memory``) and available in all (``memory_limit``, where that is known).

    On an accelerator both are its own, with ``memory_reserved`` and ``memory_peak`` as its
    allocator counts them; else they are this process's. Where its address space is limited to less
    than the host has (``ulimit -v``), that is what runs short, and is counted.
    """
    import torch

    if torch.cuda.is_available():
        stats = torch.cuda.memory_stats()
        return {
            "memory": stats.get("allocated_bytes.all.current", 0) / _GIB,
            "memory_reserved": stats.get("reserved_bytes.all.current", 0) / _GIB,
            "memory_peak": stats.get("allocated_bytes.all.peak", 0) / _GIB,
            "memory_limit": _device_memory(),
        }
    return host_memory_in_use()


def host_memory_in_use(num_processes: int = 1) -> dict[str, float]:
    """``memory_in_use`` of the host, where ``num_processes`` have equal shares of its memory."""
    limit, space = _host_memory(), _address_space()
    if limit is not None:
        limit /= num_processes
    if space is not None and (limit is None or space < limit):
        return {"memory": _statm()[0] * _page_size() / _GIB, "memory_limit": space}
    used = {"memory": _resident_bytes() / _GIB}
    return used if limit is None else {**used, "memory_limit": limit}


def memory_share() -> float:
    """The share of the memory that was in use at most, 0 where that is not known."""
    found = memory_in_use()
    limit = found.get("memory_limit")
    return max(found["memory"], found.get("memory_peak", 0.0)) / limit if limit else 0.0


def _resident_bytes() -> int:
    """Of this process alone: pages of mapped files, which data is read from, cost nothing."""
    try:
        _, resident, shared, *_ = _statm()
        return (resident - shared) * _page_size()
    except OSError:  # not Linux
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024)


def _statm() -> list[int]:
    """Pages: addressed, resident, shared, and more."""
    return [int(word) for word in Path("/proc/self/statm").read_text(encoding="ascii").split()]


def _address_space() -> float | None:
    """How much this process may address, GiB, where Linux limits it."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform != "linux" or limit == resource.RLIM_INFINITY:
        return None
    return limit / _GIB


@cache
def _page_size() -> int:
    return os.sysconf("SC_PAGE_SIZE")


@cache
def _device_memory() -> float:
    import torch

    return float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory) / _GIB


@cache
def _host_memory() -> float | None:
    """What this process may take, GiB: of the machine, or of its container."""
    limits = []
    for path in _CGROUP_LIMITS:
        try:
            text = Path(path).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():  # "max" where there is none
            limits.append(int(text))
    with suppress(ValueError, OSError):  # not told on every system
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(limits) / _GIB if limits else None
