"""What the doctor reads and measures: cores, control groups, folders, packages, compilers."""

import os
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
import torch

from tests.unit.monitoring.disks import small_disk
from ultrathink.config import load_config
from ultrathink.insight.doctor import machine
from ultrathink.insight.doctor import speed as speed_module
from ultrathink.insight.doctor.diagnose import diagnose
from ultrathink.insight.doctor.machine import (
    Memory,
    cpu_quota,
    memory_limit,
    read_memory,
    read_processor,
    try_folder,
)
from ultrathink.insight.doctor.packages import read_packages
from ultrathink.insight.doctor.speed import CoreWatch, Sharing, disk_rate
from ultrathink.insight.doctor.toolchain import read_toolchain
from ultrathink.training.compiling import compiler_problem
from ultrathink.training.pace import CoreUse

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads files of Linux")


# -- cores and memory ------------------------------------------------------------------------------


@linux
def test_this_machine_is_read() -> None:
    processor, memory = read_processor(), read_memory()
    assert processor.logical_cores == os.cpu_count()
    assert 1 <= (processor.physical_cores or 0) <= (os.cpu_count() or 1)
    assert 1 <= processor.usable_cores <= len(os.sched_getaffinity(0))
    assert 0 < (memory.usable or 0) <= (memory.total or 0)


def test_a_limit_counts_where_it_is_tighter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_limit", lambda: (1000, 300))
    memory = read_memory()
    assert (memory.limit, memory.limit_free, memory.usable) == (1000, 700, 700)
    assert Memory(16, 12, None, None, None).usable == 12


@linux
def test_cores_that_this_process_may_not_use_do_not_count() -> None:
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        pytest.skip("there is one core only")
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert read_processor().usable_cores == 1
    finally:
        os.sched_setaffinity(0, allowed)


V1_CPU = {"cpu/x/cpu.cfs_quota_us": "60000", "cpu/x/cpu.cfs_period_us": "20000"}
V1_MEMORY = {"memory/x/memory.limit_in_bytes": "7", "memory/x/memory.usage_in_bytes": "5"}
NO_LIMIT = "9223372036854771712"


@pytest.mark.parametrize(
    ("membership", "files", "quota", "limit"),
    [
        ("0::/", {"cpu.max": "max 100000", "memory.max": "max"}, None, None),
        ("0::/a/b", {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"}, 1.5, None),
        ("0::/a/b", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "100000 100000"}, 1.0, None),
        ("0::/not/visible/here", {"cpu.max": "200000 100000", "memory.max": "9"}, 2.0, (9, None)),
        ("0::/a", {"a/memory.max": "1000", "a/memory.current": "300"}, None, (1000, 300)),
        ("0::/a", {"a/memory.max": "1000", "memory.max": "500"}, None, (500, None)),
        ("3:cpu,cpuacct:/x", {"cpu,cpuacct/x/cpu.cfs_quota_us": "50000"}, 0.5, None),
        ("3:cpu:/x\n4:memory:/x", V1_CPU | V1_MEMORY, 3.0, (7, 5)),
        ("3:cpu:/", {"cpu/cpu.cfs_quota_us": "-1"}, None, None),
        ("4:memory:/", {"memory/memory.limit_in_bytes": NO_LIMIT}, None, None),
        ("0::/", {}, None, None),
    ],
)
def test_limits_of_control_groups(
    tmp_path: Path,
    membership: str,
    files: dict[str, str],
    quota: float | None,
    limit: tuple[int, int | None] | None,
) -> None:
    for name, text in {"../membership": membership, **files}.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert cpu_quota(tmp_path / "groups", tmp_path / "membership") == quota
    assert memory_limit(tmp_path / "groups", tmp_path / "membership") == limit


# -- folders and disks -----------------------------------------------------------------------------


def test_a_folder_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    there, new = try_folder(tmp_path), try_folder(tmp_path / "a" / "b")
    assert (there.exists, there.problem) == (True, None)
    assert (new.exists, new.problem) == (False, None)
    assert (new.free or 0) > 0
    assert (disk_rate(tmp_path / "runs", size_bytes=8 * 2**20) or 0) > 1e5
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "runs").write_text("")  # a file where a folder should be
    assert try_folder(tmp_path / "runs").problem == "not a directory"
    assert try_folder(tmp_path / "runs" / "mine").problem == "not a directory"


@linux
def test_a_disk_without_room_and_one_that_is_read_only(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        assert disk_rate(disk) is None
        assert list(disk.iterdir()) == []
        with (disk / "full").open("wb", buffering=0) as file:
            while file.write(bytes(4096)) == 4096 and file.tell() < 60 * 1024:
                pass
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert try_folder(disk / "runs").problem == "read-only file system"


# -- speed -----------------------------------------------------------------------------------------


def test_a_whole_look_measures_each_format_on_one_and_on_all_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    short = {"_SECONDS_PER_RATE": 0.01, "_LONG_ENOUGH_S": 1e-5, "_COPIED_BYTES": 2**20}
    for name, value in short.items():
        monkeypatch.setattr(speed_module, name, value)
    report = diagnose(load_config("debug", [f"run.dir={tmp_path / 'runs'}"]), "debug")
    assert report.cpu_speed is not None
    threads = sorted({1, report.processor.usable_cores, torch.get_num_threads()})
    measured = [(r.precision, r.threads) for r in report.cpu_speed.products]
    assert measured == list(product(("fp32", "bf16", "fp64"), threads))
    assert all(1e7 < r.flops < 1e14 for r in report.cpu_speed.products)
    assert 1e7 < (report.cpu_speed.memory or 0) < 1e13
    assert report.disk_rate is not None
    assert report.device_speed is None or torch.cuda.is_available()
    assert list(tmp_path.iterdir()) == []


@linux
def test_what_others_do_with_the_cores_is_seen() -> None:
    burner = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        watch, deadline = CoreWatch(), time.monotonic() + 60
        while True:
            seen = watch.result()
            if seen is not None and seen.others + seen.stolen > 0.2:
                break
            assert time.monotonic() < deadline, seen
            time.sleep(0.1)
    finally:
        burner.kill()
        burner.wait()


def test_what_this_process_does_itself_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    uses = [CoreUse(10.0, 1.0, 50.0, 4, 5.0), None, CoreUse(12.0, 3.0, 58.0, 4, 6.0)]
    uses += [CoreUse(10.1, 1.1, 50.5, 4, 5.0)]
    monkeypatch.setattr(speed_module, "core_use", lambda: uses.pop(0))
    watch = CoreWatch()
    assert watch.result() is None  # the system does not report it
    assert watch.result() == Sharing(seconds=2.0, others=3.0, stolen=0.5)
    assert watch.result() is None  # too early


# -- packages and compilers ------------------------------------------------------------------------


def test_packages_are_those_of_the_metadata() -> None:
    packages = read_packages() or ()
    (found,) = (p for p in packages if p.name == "torch")
    assert (found.installed, found.fits, found.extra) == (torch.__version__, True, None)
    assert {p.extra for p in packages} == {None, "hf", "plot", "test"}
    assert read_packages("a-package-that-nobody-has-installed") is None


def test_versions_and_extras_are_distinguished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "made_up-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: made-up\nVersion: 1.0\n"
        "Requires-Dist: numpy>=99\n"
        "Requires-Dist: PyYAML<99\n"
        "Requires-Dist: rich; python_version < '3'\n"
        "Requires-Dist: nobody-has-this>=2; extra == 'fast'\n"
        "Requires-Dist: pydantic>=2; extra == 'fast'\n"
        "Requires-Dist: made-up[fast]; extra == 'all'\n"
        "Provides-Extra: fast\nProvides-Extra: all\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    packages = read_packages("made-up")
    assert packages is not None
    assert [(p.name, p.installed is not None, p.fits, p.extra) for p in packages] == [
        ("numpy", True, False, None),
        ("pyyaml", True, True, None),
        ("nobody-has-this", False, False, "fast"),
        ("pydantic", True, True, "fast"),
    ]
    assert packages[0].fix == 'pip install "numpy>=99"'


@pytest.mark.skipif(compiler_problem() is not None, reason="no C++ compiler to try")
def test_the_compiler_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    tools = read_toolchain(try_out=True)
    assert tools.problem is None
    assert tools.version is not None
    assert (tools.cache, tools.cache_bytes) == (str(tmp_path), 0)
    broken = tmp_path / "g++"
    broken.write_text('#!/bin/sh\necho "g++: fatal error: no cc1plus" >&2\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    tools = read_toolchain(try_out=True)
    assert tools.version is None
    assert "cannot compile a trial (g++: fatal error: no cc1plus)" in str(tools.problem)
    assert read_toolchain(try_out=False).problem is None
