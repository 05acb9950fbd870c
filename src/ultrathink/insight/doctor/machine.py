"""What this machine has, as its files tell it: cores, memory, disks. Without torch.

What cannot be read on a system is None.
"""

from __future__ import annotations

import math
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

Value = TypeVar("Value")

# Settings of the surroundings that change what training does.
_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "LD_PRELOAD",
    "CUDA_VISIBLE_DEVICES",
    "CUBLAS_WORKSPACE_CONFIG",
    "CXX",
    "TORCHINDUCTOR_CACHE_DIR",
    "ULTRATHINK_CACHE",
)
_NO_LIMIT = 2**60  # control groups without a limit show a number beyond all memory


@dataclass(frozen=True)
class Processor:
    """The cores, and how many of them this process gets."""

    name: str | None
    physical_cores: int | None
    logical_cores: int | None
    allowed_cores: int | None  # logical cores that the scheduler may put this process on
    quota: float | None
    """Cores' worth of time that its control group may use; None where nothing limits it."""

    @property
    def shared_cores(self) -> int:
        """Cores that this process finds itself on, maybe with others; at least 1."""
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
    limit: int | None  # what the control group may use; None where nothing limits it
    limit_free: int | None  # what of the limit is left
    shared: int | None  # free space of /dev/shm, through which data workers are told what to do

    @property
    def usable(self) -> int | None:
        """Bytes that a program may still take, as far as it is known."""
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


def told(read: Callable[[], Value]) -> Value | None:
    """What ``read`` returns, None where this system does not tell it."""
    try:
        return read()
    except Exception:  # a fact that is missing must not hide the others
        return None


def read_processor() -> Processor:
    """The processor, from /proc, /sys and the scheduler."""
    return Processor(
        name=told(_processor_name),
        physical_cores=told(_physical_cores),
        logical_cores=os.cpu_count(),
        allowed_cores=told(lambda: len(os.sched_getaffinity(0))),
        quota=told(cpu_quota),
    )


def read_memory() -> Memory:
    """Main memory, its limit for this process, and shared memory."""
    limit, used = told(memory_limit) or (None, None)
    return Memory(
        total=told(lambda: os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")),
        available=told(_available_memory),
        limit=limit,
        limit_free=None if limit is None or used is None else max(0, limit - used),
        shared=told(lambda: shutil.disk_usage("/dev/shm").free),
    )


def read_environment() -> dict[str, str]:
    """The variables that are set, of those that change what training does."""
    return {name: os.environ[name] for name in _VARIABLES if name in os.environ}


def try_folder(path: Path) -> Folder:
    """Write a file where ``path`` is or would be made, and look at its disk; nothing stays."""
    place = nearest_folder(path)
    problem = None
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"\0")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        problem = (error.strerror or str(error)).lower()
    usage = told(lambda: shutil.disk_usage(place))
    return Folder(
        path=str(path.absolute()),
        exists=path.is_dir(),
        free=usage.free if usage else None,
        total=usage.total if usage else None,
        problem=problem,
    )


def nearest_folder(path: Path) -> Path:
    """``path``, or what of it exists: where its folders would be made."""
    path = path.absolute()
    return next((place for place in (path, *path.parents) if place.exists()), path)


# -- control groups --------------------------------------------------------------------------------


def cpu_quota(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> float | None:
    """Cores' worth of time that this process may use; None where nothing limits it.

    https://docs.kernel.org/admin-guide/cgroup-v2.html (cpu.max), and cpu.cfs_quota_us of version 1.
    """
    quotas = []
    for folder in _groups(root, membership, "cpu"):
        words = _words(folder / "cpu.max")
        if words is None:
            words = [
                *(_words(folder / "cpu.cfs_quota_us") or ["-1"]),
                *(_words(folder / "cpu.cfs_period_us") or ["100000"]),
            ]
        if words[0] not in ("max", "-1"):
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def memory_limit(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> tuple[int, int | None] | None:
    """Bytes that this process's control group may use, and uses; None where nothing limits it."""
    limits: list[tuple[int, int | None]] = []
    for folder in _groups(root, membership, "memory"):
        for limit_name, use_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, used = _words(folder / limit_name), _words(folder / use_name)
            if limit is not None and limit[0] != "max" and int(limit[0]) < _NO_LIMIT:
                limits.append((int(limit[0]), int(used[0]) if used else None))
    return min(limits, key=lambda pair: pair[0], default=None)


def _groups(root: Path, membership: Path, controller: str) -> Iterator[Path]:
    """Folders of the control groups that this process is in, each with those around it."""
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


def _words(path: Path) -> list[str] | None:
    try:
        return path.read_text(encoding="utf-8").split() or None
    except OSError:
        return None


# -- facts of one system or another ----------------------------------------------------------------


def _processor_name() -> str | None:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "cpu model") and value.strip():
            return value.strip()
    return platform.processor() or None


def _physical_cores() -> int | None:
    """Different sets of sibling threads, over all cores of the machine."""
    files = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings_list")
    return len({file.read_text(encoding="utf-8").strip() for file in files}) or None


def _available_memory() -> int | None:
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None
