"""A diagnosis in words: sections of labelled lines."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from rich.filesize import decimal

from ultrathink.insight.doctor.findings import cores, describe_folder
from ultrathink.insight.doctor.report import Diagnosis

if TYPE_CHECKING:
    from ultrathink.insight.doctor.accelerators import Accelerators

UNKNOWN = "unknown"

Lines = list[tuple[str, str]]  # each a label and a text


def sections(report: Diagnosis) -> dict[str, Lines]:
    """Everything but the problems, by heading."""
    found = {
        "Versions": _versions(report),
        "Machine": _machine(report),
        "Folders": _folders(report),
        "Speed": _speed(report),
        f"What auto chooses here for {report.run.config}": _choices(report),
        "Packages": _packages(report),
    }
    return {title: lines for title, each in found.items() if (lines := list(each))}


def verdict(report: Diagnosis) -> str:
    """The last line."""
    if not report.can_train:
        return "Training is not possible here until the errors above are fixed."
    count = sum(problem.level == "warning" for problem in report.problems)
    if count:
        return f"Training works here; {count} warning{'s' if count > 1 else ''} above."
    return "No problems found. Start with: ultrathink train"


def _versions(report: Diagnosis) -> Iterator[tuple[str, str]]:
    versions = report.versions
    yield "ultrathink", versions["ultrathink"]
    yield "python", f"{versions['python']} ({versions['executable']})"
    if report.torch is not None:
        yield "torch", f"{report.torch.version} (built for {report.torch.build})"
    else:
        yield "torch", UNKNOWN if report.torch_error is None else "cannot be imported"
    yield "platform", versions["platform"]


def _machine(report: Diagnosis) -> Iterator[tuple[str, str]]:
    processor, memory = report.processor, report.memory
    yield "processor", (report.torch and report.torch.processor) or UNKNOWN
    usable = f"this process may use {processor.usable_cores}"
    if processor.quota is not None:
        usable += f" (CPU limit of its control group: {processor.quota:g})"
    physical, logical = processor.physical_cores, processor.logical_cores
    yield "cores", f"{physical or UNKNOWN} physical, {logical or UNKNOWN} logical; {usable}"
    if report.torch is not None:
        yield "threads", f"{report.torch.threads} (torch)"
        bf16 = report.torch.bf16
        products = f"bf16 products by {bf16}" if bf16 else "no bf16 products"
        yield "instructions", f"{report.torch.instructions}; {products}"
    limit = f"; limit of the control group {_size(memory.limit)}" if memory.limit else ""
    yield "memory", f"{_size(memory.total)}, {_size(memory.available)} available{limit}"
    yield "/dev/shm", f"{_size(memory.shared)} free"
    if report.accelerators is not None:
        yield from _accelerators(report.accelerators)
    yield from report.environment.items()


def _accelerators(found: Accelerators) -> Iterator[tuple[str, str]]:
    for number, gpu in enumerate(found.gpus):
        sizes = f"{gpu.name}, {_size(gpu.memory)}, {_size(gpu.free)} free"
        rest = f"compute capability {gpu.capability}, driver {found.driver or UNKNOWN}"
        yield f"GPU {number}", f"{sizes}, {rest}"
    if found.mps:
        yield "GPU", "Apple's, through MPS"
    elif not found.gpus:
        yield "GPU", "none that torch can use"


def _folders(report: Diagnosis) -> Iterator[tuple[str, str]]:
    yield "runs", describe_folder(report.run_folder)
    if report.disk_rate is not None:
        rate = f"{_size(report.disk_rate)}/s written and flushed"
        yield "disk of runs", f"{rate}; a checkpoint of 1 GB takes {1e9 / report.disk_rate:.1f} s"
    yield "cache", describe_folder(report.cache_folder)
    tools = report.toolchain
    if tools is not None:
        yield "compiled code", f"{tools.cache}: {_size(tools.cache_bytes)}"
        compiler = f"{tools.compiler}: {tools.version or UNKNOWN}" if tools.compiler else "none"
        yield "C++ compiler", compiler


def _speed(report: Diagnosis) -> Iterator[tuple[str, str]]:
    for place, speed in (("", report.cpu_speed), ("GPU, ", report.device_speed)):
        if speed is None:
            continue
        for precision, rates in groupby(speed.products, key=lambda rate: rate.precision):
            yield f"{place}{precision} products", _rates([(r.threads, r.flops) for r in rates])
        yield f"{place}memory", f"{_size(speed.memory)}/s read and written by copying"
    sharing = report.sharing
    if sharing is not None:
        stolen = f", the host took {sharing.stolen:.2f}" if sharing.stolen >= 0.01 else ""
        of = f"{cores(report.processor.shared_cores)} over {sharing.seconds:.1f} s"
        yield "other processes", f"used {sharing.others:.2f} of {of}{stolen}"
    elif report.torch is not None:
        load = UNKNOWN if report.load_average is None else f"load average {report.load_average:.2f}"
        yield "other processes", load


def _rates(rates: list[tuple[int | None, float]]) -> str:
    """100 GFLOP/s on 1 thread, 190 on 2 (1.9 times)."""
    (threads, first), *rest = rates
    where = "" if threads is None else f" on {threads} thread{'s' if threads > 1 else ''}"
    scale, unit = (1e12, "TFLOP/s") if first >= 1e13 else (1e9, "GFLOP/s")
    words = [f"{first / scale:.3g} {unit}{where}"]
    words += [
        f"{flops / scale:.3g} on {count} ({flops / first:.2g} times)" for count, flops in rest
    ]
    return ", ".join(words)


def _choices(report: Diagnosis) -> Iterator[tuple[str, str]]:
    for choice in report.choices:
        value = str(choice.value).lower() if isinstance(choice.value, bool) else choice.value
        yield choice.key.rpartition(".")[2], f"{value}: {choice.reason}"


def _packages(report: Diagnosis) -> Iterator[tuple[str, str]]:
    if report.packages is None:
        return
    groups: dict[str | None, list[str]] = {}
    fixes: dict[str | None, str] = {}
    for package in report.packages:
        words = f"{package.name} {package.installed or 'missing'}"
        groups.setdefault(package.extra, []).append(words)
        if not package.fits:
            fixes[package.extra] = package.fix
    for extra, listed in groups.items():
        fix = f". Install: {fixes[extra]}" if extra is not None and extra in fixes else ""
        yield ("required" if extra is None else f"extra {extra}"), ", ".join(listed) + fix


def _size(count: float | None) -> str:
    return UNKNOWN if count is None else decimal(int(count))
