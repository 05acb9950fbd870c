"""Cores, memory and disks of this machine, from psutil and Linux's control groups. Without torch.

A fact that the system does not report is None.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil

Value = TypeVar("Value")

# Environment variables that change what training does.
_VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA", "LD_PRELOAD", "CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG", "CXX",
    "TORCHINDUCTOR_CACHE_DIR", "ULTRATHINK_CACHE",
)  # fmt: skip
_GROUPS, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_NO_LIMIT = 2**60  # version 1 control groups without a limit show a number beyond all memory


@dataclass(frozen=True)
class Processor:
    """The cores, and how many of them this process may use."""

    physical_cores: int | None
    logical_cores: int | None
    allowed_cores: int | None  # logical cores in the affinity mask of this process
    quota: float | None
    """CPU limit of the control group, in cores; None for no limit."""

    @property
    def shared_cores(self) -> int:
        """Cores that this process runs on, perhaps with other processes; at least 1."""
        return self.allowed_cores or self.logical_cores or 1

    @property
    def usable_cores(self) -> int:
        """Threads that can run at the same time, at least 1."""
        if self.quota is None:
            return self.shared_cores
        return max(1, min(self.shared_cores, math.floor(self.quota)))


@dataclass(frozen=True)
class Memory:
    """Main memory in bytes."""

    total: int | None
    available: int | None
    limit: int | None  # of the control group; None for no limit
    limit_free: int | None  # what is left of the limit
    shared: int | None  # free space of /dev/shm, which data workers use

    @property
    def usable(self) -> int | None:
        """Bytes that a program may still allocate."""
        known = [value for value in (self.available, self.limit_free) if value is not None]
        return min(known, default=None)


@dataclass(frozen=True)
class Folder:
    """A folder that training writes to, and its disk."""

    path: str
    exists: bool
    free: int | None
    total: int | None
    problem: str | None  # why nothing can be written there; None where a trial succeeded


def attempt(read: Callable[[], Value]) -> Value | None:
    """The result of ``read``; None where it raises."""
    try:
        return read()
    except Exception:  # one missing fact must not hide the others
        return None


def read_processor() -> Processor:
    """The cores, as psutil, the scheduler and the control group count them."""
    return Processor(
        physical_cores=attempt(lambda: psutil.cpu_count(logical=False)),
        logical_cores=attempt(psutil.cpu_count),
        allowed_cores=attempt(lambda: len(os.sched_getaffinity(0))),
        quota=attempt(cpu_quota),
    )


def read_memory() -> Memory:
    """Main memory, its limit for this process, and shared memory."""
    memory = attempt(psutil.virtual_memory)
    limit, used = attempt(memory_limit) or (None, None)
    return Memory(
        total=memory.total if memory else None,
        available=memory.available if memory else None,
        limit=limit,
        limit_free=None if limit is None or used is None else max(0, limit - used),
        shared=attempt(lambda: psutil.disk_usage("/dev/shm").free),
    )


def read_environment() -> dict[str, str]:
    """The environment variables that are set and change what training does."""
    return {name: os.environ[name] for name in _VARIABLES if name in os.environ}


def try_folder(path: Path) -> Folder:
    """Write and delete a file where ``path`` is or would be created, and measure its disk."""
    place = nearest_folder(path)
    problem = None
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"\0")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        problem = (error.strerror or str(error)).lower()
    usage = attempt(lambda: psutil.disk_usage(str(place)))
    return Folder(
        path=str(path.absolute()),
        exists=path.is_dir(),
        free=usage.free if usage else None,
        total=usage.total if usage else None,
        problem=problem,
    )


def nearest_folder(path: Path) -> Path:
    """``path``, or its closest parent that exists."""
    path = path.absolute()
    return next((place for place in (path, *path.parents) if place.exists()), path)


# -- control groups --------------------------------------------------------------------------------


def cpu_quota(root: Path = _GROUPS, membership: Path = _MEMBERSHIP) -> float | None:
    """CPU limit of this process's control groups, in cores; None for no limit.

    https://docs.kernel.org/admin-guide/cgroup-v2.html (cpu.max), and cpu.cfs_quota_us of version 1.
    """
    quotas = []
    for folder in _groups(root, membership, "cpu"):
        words = _words(folder / "cpu.max") or [
            *_words(folder / "cpu.cfs_quota_us"),
            *(_words(folder / "cpu.cfs_period_us") or ["100000"]),
        ]
        if len(words) > 1 and words[0] not in ("max", "-1"):
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def memory_limit(
    root: Path = _GROUPS, membership: Path = _MEMBERSHIP
) -> tuple[int, int | None] | None:
    """Bytes that this process's control groups may use, and do use; None for no limit."""
    limits: list[tuple[int, int | None]] = []
    for folder in _groups(root, membership, "memory"):
        for limit_name, use_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, used = _words(folder / limit_name), _words(folder / use_name)
            if limit and limit[0] != "max" and int(limit[0]) < _NO_LIMIT:
                limits.append((int(limit[0]), int(used[0]) if used else None))
    return min(limits, key=lambda pair: pair[0], default=None)


def _groups(root: Path, membership: Path, controller: str) -> Iterator[Path]:
    """Folders of the control groups of this process, each followed by its parents."""
    for line in membership.read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            tops = [root, root / "unified"]
        elif controller in controllers.split(","):
            tops = [root / controller, root / controllers]
        else:
            continue
        inside = Path(path.lstrip("/"))
        for top in tops:
            yield from (top / part for part in (inside, *inside.parents))


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except OSError:
        return []
