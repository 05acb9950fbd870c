"""Looking at the machine: what is read, what is measured, and in which order."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ultrathink
from ultrathink.config.schema import Config
from ultrathink.config.size import sizes
from ultrathink.core.errors import UltrathinkError
from ultrathink.data.cache import cache_folder
from ultrathink.insight.doctor import machine
from ultrathink.insight.doctor.findings import find_problems
from ultrathink.insight.doctor.report import Choice, Diagnosis, Run, Versions

if TYPE_CHECKING:
    import torch

    from ultrathink.insight.doctor.packages import Package

Progress = Callable[[str], None]

# What `auto` decides, in the order in which one hangs on another.
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
    """Look at this machine with the eyes of ``config``, which was called ``name``.

    ``quick`` measures only what ``auto`` needs. ``progress`` is told what is being done. What
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
        versions=Versions(
            ultrathink=ultrathink.__version__,
            python=platform.python_version(),
            executable=sys.executable,
            platform=platform.platform(),
        ),
        run=_run(config, name),
        processor=machine.read_processor(),
        memory=machine.read_memory(),
        environment=machine.read_environment(),
        run_folder=machine.try_folder(Path(config.run.dir)),
        cache_folder=machine.try_folder(cache_folder(config.data.cache_dir)),
        packages=machine.told(_packages),
        load_average=machine.told(lambda: os.getloadavg()[0]),
    )


def _packages() -> tuple[Package, ...] | None:
    from ultrathink.insight.doctor.packages import read_packages

    packages = read_packages()
    return None if packages is None else tuple(packages)


def _run(config: Config, name: str) -> Run:
    parameters = sizes(config.model).total
    itemsize = 8 if config.training.precision == "fp64" else 4
    # The weights and, of most optimizers, two moments of each; while training a gradient as well.
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
    except Exception as error:  # whatever a broken installation does
        lines = str(error).splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}"
    return None


def _with_torch(report: Diagnosis, config: Config, quick: bool, progress: Progress) -> Diagnosis:
    import torch

    from ultrathink.insight.doctor.accelerators import read_accelerators, read_torch
    from ultrathink.insight.doctor.speed import CoreWatch, disk_rate, measure_speed
    from ultrathink.insight.doctor.toolchain import read_toolchain

    report = replace(
        report,
        torch=machine.told(read_torch),
        accelerators=machine.told(read_accelerators),
        processor=_completed(report.processor),
    )
    watch = CoreWatch()
    if not quick:
        progress("measuring products and memory")
        usable = report.processor.usable_cores
        threads = sorted({1, usable, torch.get_num_threads()})
        cpu_speed = machine.told(lambda: measure_speed(torch.device("cpu"), threads))
        report = replace(report, cpu_speed=cpu_speed)
    progress("trying what auto takes")
    report, device = _with_choices(report, config)
    watch.wait()
    report = replace(report, sharing=watch.result())  # before other processes work for us
    if not quick and device is not None and device.type != "cpu":
        progress(f"measuring {device}")
        device_speed = machine.told(lambda: measure_speed(device, ()))
        report = replace(report, device_speed=device_speed)
    if not quick:
        progress("measuring the disk")
        rate = machine.told(lambda: disk_rate(Path(config.run.dir)))
        report = replace(report, disk_rate=rate)
    progress("trying the compiler")
    toolchain = machine.told(lambda: read_toolchain(try_out=not quick))
    return replace(report, toolchain=toolchain)


def _completed(processor: machine.Processor) -> machine.Processor:
    """What this system's files do not tell of the processor, torch may know."""
    from ultrathink.training.hardware import cpu_capabilities

    facts = machine.told(cpu_capabilities) or {}
    return replace(
        processor,
        name=processor.name or facts.get("cpu_name"),
        physical_cores=processor.physical_cores or facts.get("num_physical_cores"),
    )


def _with_choices(report: Diagnosis, config: Config) -> tuple[Diagnosis, torch.device | None]:
    """What a trainer of ``config`` would choose here, by the function that it would call."""
    from ultrathink.training.choices import choose

    try:
        with _switches_kept():
            chosen, choices = choose(config, samples_per_epoch=None)
    except UltrathinkError as error:
        return replace(report, choice_error=str(error)), None
    found = tuple(Choice(key, _value_at(chosen, key), _reason(chosen, key)) for key in _CHOSEN_KEYS)
    return replace(report, choices=found), choices.device


@contextmanager
def _switches_kept() -> Iterator[None]:
    """``choose`` may make this process deterministic, for a trainer that is never built."""
    import torch

    from ultrathink.training.determinism import set_deterministic

    try:
        yield
    finally:
        set_deterministic(False, torch.device("cpu"))


def _value_at(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _reason(config: Config, key: str) -> str:
    origin = config.origin(key)
    return origin.removeprefix(_CHOSEN) if origin.startswith(_CHOSEN) else f"set by: {origin}"
