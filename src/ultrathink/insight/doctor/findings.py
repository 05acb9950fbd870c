"""The problems that follow from a diagnosis, each with its fix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich.filesize import decimal

from ultrathink.insight.doctor.machine import Folder
from ultrathink.insight.doctor.report import Diagnosis, Problem

if TYPE_CHECKING:
    from ultrathink.insight.doctor.accelerators import Gpu

# Cores' worth of other load above which the threads of an operation wait for each other.
_OTHERS_MAY = 0.25
# n threads on n cores should reach at least this share of n times the rate of one; below it, they
# wait for each other. Shared clocks and caches cost some of it on any machine.
_SCALING = 0.5
_WORTH_MORE_THREADS = 1.3
_COMPILER_FIX = (
    "Debian, Ubuntu: sudo apt-get install g++ python3-dev; Fedora: sudo dnf install gcc-c++ "
    "python3-devel; macOS: xcode-select --install"
)


def find_problems(report: Diagnosis) -> tuple[Problem, ...]:
    """All problems, the most severe first."""
    found = [problem for rule in _RULES for problem in rule(report)]
    order = ("error", "warning", "note")
    return tuple(sorted(found, key=lambda problem: order.index(problem.level)))


# -- errors: training is impossible ----------------------------------------------------------------


def _torch_works(report: Diagnosis) -> Iterator[Problem]:
    if report.torch_error is not None:
        package = next((p for p in report.packages or () if p.name == "torch"), None)
        wanted = package.requirement if package else "torch"
        fix = f'pip install --force-reinstall "{wanted}"'
        yield Problem("error", f"torch cannot be imported: {report.torch_error}", fix)


def _folders_can_be_written(report: Diagnosis) -> Iterator[Problem]:
    for what, folder, other in (
        ("run folders", report.run_folder, "run.dir=FOLDER"),
        ("the cache", report.cache_folder, "ULTRATHINK_CACHE=FOLDER ultrathink train"),
    ):
        if folder.problem is not None:
            text = f"nothing can be written to {folder.path} ({what}): {folder.problem}"
            yield Problem("error", text, f"choose another folder: {other}, or repair this one")


def _choices_can_be_made(report: Diagnosis) -> Iterator[Problem]:
    if report.choice_error is not None:
        yield Problem("error", report.choice_error, fix=None)


def _memory_suffices(report: Diagnosis) -> Iterator[Problem]:
    need = report.run.state_bytes
    gpu = _gpu(report)
    known = [report.memory.total, report.memory.limit] if gpu is None else [gpu.memory]
    total = min((size for size in known if size is not None), default=None)
    free = report.memory.usable if gpu is None else gpu.free
    what = "the memory here" if gpu is None else f"the memory of {gpu.name}"
    words = (
        f"weights, gradients and optimizer state of {report.run.config} take "
        f"{decimal(need)} before a single activation"
    )
    fix = "a smaller model (model.hidden_size, model.num_layers), or a machine with more memory"
    if total is not None and need > total:
        yield Problem("error", f"{words}, more than {what} ({decimal(total)})", fix)
    elif free is not None and need > free:
        text = f"{words}; {what} has {decimal(free)} free"
        yield Problem("warning", text, f"close programs that use the memory, or choose {fix}")


# -- warnings and notes ----------------------------------------------------------------------------


def _cores_are_free(report: Diagnosis) -> Iterator[Problem]:
    if report.torch is None or report.torch.threads < 2:
        return
    threads, processor = report.torch.threads, report.processor
    shared, usable = processor.shared_cores, processor.usable_cores
    seen = []
    busy = report.sharing.others + report.sharing.stolen if report.sharing else 0.0
    if busy > _OTHERS_MAY and threads + busy > shared + _OTHERS_MAY:
        seen.append(f"other processes used {busy:.1f} of {cores(shared)} during the measurement")
    scaling = _scaling(report, threads)
    at_once = min(threads, usable, processor.physical_cores or usable)
    if scaling is not None and at_once > 1 and scaling < _SCALING * at_once:
        seen.append(f"{threads} threads compute at {scaling:.2g} times the rate of one")
    if seen:
        fewer = max(1, min(threads - 1, usable, int(shared - busy)))
        yield Problem(
            "warning",
            f"{', and '.join(seen)}; threads wait for each other, which can make training ten "
            f"times slower",
            f"stop the other processes, or train with fewer threads: "
            f"OMP_NUM_THREADS={fewer} ultrathink train",
        )


def _threads_fit_the_cores(report: Diagnosis) -> Iterator[Problem]:
    if report.torch is None:
        return
    threads, usable = report.torch.threads, report.processor.usable_cores
    fix = f"OMP_NUM_THREADS={usable} ultrathink train"
    if threads > usable:
        quota = report.processor.quota
        why = f" (its control group allows {quota:g})" if quota is not None else ""
        text = f"torch uses {threads} threads, and this process may use {cores(usable)}{why}"
        yield Problem("warning", text, fix)
        return
    fewer, all_of_them = _rate(report, threads), _rate(report, usable)
    if fewer and all_of_them and all_of_them > _WORTH_MORE_THREADS * fewer:
        text = (
            f"torch uses {threads} of {cores(usable)}; with all of them products are "
            f"{all_of_them / fewer:.1f} times as fast"
        )
        yield Problem("note", text, fix)


def _it_can_compile(report: Diagnosis) -> Iterator[Problem]:
    tools = report.toolchain
    if tools is None or tools.problem is None or not report.run.may_compile:
        return
    if not _device(report).startswith("cuda"):
        text = f"{tools.problem}; training runs uncompiled, which is slower"
        yield Problem("warning", text, _COMPILER_FIX)


def _gpus_are_used(report: Diagnosis) -> Iterator[Problem]:
    found = report.accelerators
    if found is None:
        return
    texts = [f"torch warns: {text}" for text in found.warnings]
    if found.driver is not None and not found.gpus and not texts:
        texts = [f"this machine has an NVIDIA driver ({found.driver}), but torch finds no GPU"]
    for text in texts:
        yield Problem(
            "warning",
            text,
            "install a torch that fits the GPU and its driver: "
            "https://pytorch.org/get-started/locally/, or train on the CPU: training.device=cpu",
        )


def _disk_has_room(report: Diagnosis) -> Iterator[Problem]:
    run, folder = report.run, report.run_folder
    need = run.checkpoint_bytes * run.checkpoints_kept
    if folder.problem is None and folder.free is not None and folder.free < need:
        yield Problem(
            "warning",
            f"{run.checkpoints_kept} checkpoints of {run.config} take up to {decimal(need)}, "
            f"and the disk of {folder.path} has {decimal(folder.free)} free",
            "free some space, keep fewer (training.checkpoint.keep=1), or choose another disk: "
            "run.dir=FOLDER",
        )


def _packages_fit(report: Diagnosis) -> Iterator[Problem]:
    if report.packages is None:
        text = "the metadata of ultrathink cannot be read, so its packages were not checked"
        yield Problem("note", text, "in its source folder: pip install -e .")
        return
    for package in report.packages:
        if package.fits or (package.extra is not None and package.installed is None):
            continue
        if package.installed is None:
            yield Problem("error", f"the package {package.name} is missing", package.fix)
        else:
            text = (
                f"{package.name} {package.installed} is installed; {package.requirement} is needed"
            )
            yield Problem("warning", text, package.fix)


Rule = Callable[[Diagnosis], Iterator[Problem]]
_RULES: tuple[Rule, ...] = (
    _torch_works,
    _folders_can_be_written,
    _choices_can_be_made,
    _memory_suffices,
    _cores_are_free,
    _threads_fit_the_cores,
    _it_can_compile,
    _gpus_are_used,
    _disk_has_room,
    _packages_fit,
)


def _device(report: Diagnosis) -> str:
    return next((str(c.value) for c in report.choices if c.key == "training.device"), "cpu")


def _gpu(report: Diagnosis) -> Gpu | None:
    """The GPU that training would use, if any."""
    kind, _, number = _device(report).partition(":")
    gpus = report.accelerators.gpus if report.accelerators else ()
    return gpus[int(number or 0)] if kind == "cuda" and gpus else None


def _rate(report: Diagnosis, threads: int) -> float | None:
    return report.cpu_speed.rate("fp32", threads) if report.cpu_speed else None


def _scaling(report: Diagnosis, threads: int) -> float | None:
    """The speed of ``threads`` threads over that of one."""
    one, many = _rate(report, 1), _rate(report, threads)
    return many / one if one and many else None


def cores(count: int) -> str:
    """``1 core``, ``2 cores``."""
    return f"{count} core{'' if count == 1 else 's'}"


def describe_folder(folder: Folder) -> str:
    """A folder, whether it exists, and the room on its disk."""
    room = "unknown" if folder.free is None else decimal(folder.free)
    state = folder.problem or ("" if folder.exists else "created when needed")
    return f"{folder.path}: {room} free" + (f"; {state}" if state else "")
