"""The memory that a run uses, and how much there is."""

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
    """GiB in use (``memory``) and in total (``memory_limit``, if known).

    With an accelerator both are the device's, with ``memory_reserved`` and ``memory_peak`` as its
    allocator counts them; otherwise they are this process's. If the address space is limited to
    less than the host's memory (``ulimit -v``), it is counted instead.
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
    """``memory_in_use`` of the host, whose memory ``num_processes`` share equally."""
    limit, space = _host_memory(), _address_space()
    if limit is not None:
        limit /= num_processes
    import psutil

    used = psutil.Process().memory_info()
    if space is not None and (limit is None or space < limit):
        return {"memory": used.vms / _GIB, "memory_limit": space}
    # The process's own pages: those of memory-mapped files, such as data, do not count.
    own = {"memory": (used.rss - getattr(used, "shared", 0)) / _GIB}
    return own if limit is None else {**own, "memory_limit": limit}


def memory_share() -> float:
    """The peak share of the memory in use; 0 if unknown."""
    found = memory_in_use()
    limit = found.get("memory_limit")
    return max(found["memory"], found.get("memory_peak", 0.0)) / limit if limit else 0.0


def _address_space() -> float | None:
    """The limit of the address space in GiB, if Linux sets one."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform != "linux" or limit == resource.RLIM_INFINITY:
        return None
    return limit / _GIB


@cache
def _device_memory() -> float:
    import torch

    return float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory) / _GIB


@cache
def _host_memory() -> float | None:
    """The memory of the machine or its container, GiB."""
    limits = []
    for path in _CGROUP_LIMITS:
        try:
            text = Path(path).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():  # "max": no limit
            limits.append(int(text))
    with suppress(ValueError, OSError):  # not available on every system
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(limits) / _GIB if limits else None
