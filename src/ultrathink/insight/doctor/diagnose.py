"""Reads and measures the machine, in this order: without torch, with torch, under load."""

from __future__ import annotations

import operator
import platform
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

import ultrathink
from ultrathink.config.schema import Config
from ultrathink.config.size import sizes
from ultrathink.core.errors import UltrathinkError
from ultrathink.data.cache import cache_folder
from ultrathink.insight.doctor.findings import find_problems
from ultrathink.insight.doctor.machine import (
    attempt,
    read_environment,
    read_memory,
    read_processor,
    try_folder,
)
from ultrathink.insight.doctor.report import Choice, Diagnosis, Run

if TYPE_CHECKING:
    import torch

    from ultrathink.insight.doctor.packages import Package

Progress = Callable[[str], None]

# What `auto` decides; each may depend on those before it.
_CHOSEN_KEYS = (
    "training.device",
    "training.precision",
    "training.compile",
    "model.attention.backend",
    "training.micro_batch_size",
)
_CHOSEN = "chosen at run time: "


def diagnose(
    config: Config, name: str, *, quick: bool = False, progress: Progress = lambda doing: None
) -> Diagnosis:
    """Examine this machine for a run of ``config``, which the report calls ``name``.

    ``quick`` measures only what ``auto`` needs. ``progress`` gets the name of each stage. What
    cannot be read is None in the report, never an error.
    """
    report = _without_torch(config, name)
    progress("importing torch")
    error = _import_error()
    if error is None:
        report = _with_torch(report, config, quick, progress)
    else:
        report = replace(report, torch_error=error)
    return replace(report, problems=find_problems(report))


def _without_torch(config: Config, name: str) -> Diagnosis:
    return Diagnosis(
        versions={
            "ultrathink": ultrathink.__version__,
            "python": platform.python_version(),
            "executable": sys.executable,
            "platform": platform.platform(),
        },
        run=_run(config, name),
        processor=read_processor(),
        memory=read_memory(),
        environment=read_environment(),
        run_folder=try_folder(Path(config.run.dir)),
        cache_folder=try_folder(cache_folder(config.data.cache_dir)),
        packages=attempt(_packages),
        load_average=attempt(lambda: psutil.getloadavg()[0]),
    )


def _packages() -> tuple[Package, ...] | None:
    from ultrathink.insight.doctor.packages import read_packages  # may lack the package packaging

    return read_packages()


def _run(config: Config, name: str) -> Run:
    parameters = sizes(config.model).total
    itemsize = 8 if config.training.precision == "fp64" else 4
    # Weights and, with most optimizers, two moments of each; in training a gradient as well.
    checkpoint_bytes = 3 * itemsize * parameters
    return Run(
        config=name,
        parameters=parameters,
        state_bytes=checkpoint_bytes + itemsize * parameters,
        checkpoint_bytes=checkpoint_bytes,
        checkpoints_kept=config.training.checkpoint.keep + 2,
        may_compile=config.training.compile is not False,
    )


def _import_error() -> str | None:
    """Why torch cannot be imported, in one line; None where it can."""
    try:
        import torch

        torch.ones(2).sum().item()
    except Exception as error:  # a broken installation may raise anything
        lines = str(error).splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}"
    return None


def _with_torch(report: Diagnosis, config: Config, quick: bool, progress: Progress) -> Diagnosis:
    import torch

    from ultrathink.insight.doctor.accelerators import read_accelerators, read_torch
    from ultrathink.insight.doctor.speed import CoreWatch, disk_rate, measure_speed
    from ultrathink.insight.doctor.toolchain import read_toolchain

    report = replace(report, torch=attempt(read_torch), accelerators=attempt(read_accelerators))
    watch = CoreWatch()
    if not quick:
        progress("measuring products and memory")
        threads = sorted({1, report.processor.usable_cores, torch.get_num_threads()})
        cpu_speed = attempt(lambda: measure_speed(torch.device("cpu"), threads))
        report = replace(report, cpu_speed=cpu_speed)
    progress("trying what auto chooses")
    report, device = _with_choices(report, config)
    watch.wait()
    report = replace(report, sharing=watch.result())  # before this command starts a compiler
    if not quick:
        if device is not None and device.type != "cpu":
            progress(f"measuring {device}")
            device_speed = attempt(lambda: measure_speed(device, ()))
            report = replace(report, device_speed=device_speed)
        progress("measuring the disk")
        rate = attempt(lambda: disk_rate(Path(config.run.dir)))
        report = replace(report, disk_rate=rate)
    progress("trying the compiler")
    return replace(report, toolchain=attempt(lambda: read_toolchain(try_out=not quick)))


def _with_choices(report: Diagnosis, config: Config) -> tuple[Diagnosis, torch.device | None]:
    """What a trainer of ``config`` would choose here, from the function that it calls."""
    import torch

    from ultrathink.training.choices import choose
    from ultrathink.training.determinism import set_deterministic

    try:
        chosen, choices = choose(config, samples_per_epoch=None)
    except UltrathinkError as error:
        return replace(report, choice_error=str(error)), None
    finally:  # it may make this process deterministic
        set_deterministic(False, torch.device("cpu"))
    found = tuple(
        Choice(key, operator.attrgetter(key)(chosen), _reason(chosen, key)) for key in _CHOSEN_KEYS
    )
    return replace(report, choices=found), choices.device


def _reason(config: Config, key: str) -> str:
    origin = config.origin(key)
    return origin.removeprefix(_CHOSEN) if origin.startswith(_CHOSEN) else f"set by: {origin}"
