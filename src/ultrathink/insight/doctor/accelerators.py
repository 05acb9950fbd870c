"""torch as it was built, and the GPUs that it finds."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch.utils import collect_env

from ultrathink.insight.doctor.machine import attempt
from ultrathink.training.hardware import bf16_instructions, cpu_capabilities


@dataclass(frozen=True)
class TorchBuild:
    """The installed torch, and what it knows of the CPU."""

    version: str
    build: str  # CPU, or the accelerator's platform with its version
    threads: int  # of one operation
    processor: str | None  # name of the CPU
    instructions: str  # the widest vector instructions that torch's kernels use on this CPU
    bf16: str | None  # this CPU's bf16 matrix instructions; None for none


@dataclass(frozen=True)
class Gpu:
    """One CUDA device; memory in bytes."""

    name: str
    memory: int
    free: int | None
    capability: str


@dataclass(frozen=True)
class Accelerators:
    """The devices beside the CPU."""

    gpus: tuple[Gpu, ...]
    mps: bool
    driver: str | None  # version of NVIDIA's driver, from nvidia-smi
    warnings: tuple[str, ...]  # torch's own: a driver too old, a GPU without kernels


def read_torch() -> TorchBuild:
    """How torch was built, and what it knows of this CPU."""
    build = "CPU"
    if torch.version.cuda is not None:
        build = f"CUDA {torch.version.cuda}"
    elif torch.version.hip is not None:
        build = f"ROCm {torch.version.hip}"
    return TorchBuild(
        version=torch.__version__,
        build=build,
        threads=torch.get_num_threads(),
        processor=attempt(lambda: cpu_capabilities().get("cpu_name")),
        instructions=torch.backends.cpu.get_cpu_capability(),
        bf16=attempt(bf16_instructions),
    )


def read_accelerators() -> Accelerators:
    """The GPUs, and what torch warns of while it initializes them."""
    gpus: tuple[Gpu, ...] = ()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            torch.cuda.init()
            gpus = tuple(_gpu(index) for index in range(torch.cuda.device_count()))
    return Accelerators(
        gpus=gpus,
        mps=torch.backends.mps.is_available(),
        driver=attempt(lambda: collect_env.get_nvidia_driver_version(collect_env.run)),
        warnings=tuple(" ".join(str(one.message).split()) for one in caught),
    )


def _gpu(index: int) -> Gpu:
    facts = torch.cuda.get_device_properties(index)
    return Gpu(
        name=facts.name,
        memory=facts.total_memory,
        free=attempt(lambda: torch.cuda.mem_get_info(index)[0]),
        capability=f"{facts.major}.{facts.minor}",
    )
