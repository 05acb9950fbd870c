"""torch as it was built, the devices that it sees, and the GPUs that it does not."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from ultrathink.insight.doctor.machine import told

_DRIVER_FILE = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class TorchBuild:
    """The torch in use."""

    version: str
    build: str  # CPU, or the accelerator's platform with its version
    threads: int  # threads that one operation is shared out to
    instructions: str  # the widest vector instructions of this CPU that torch's own kernels use
    bf16: str | None  # this CPU's bf16 matrix instructions; None where there are none


@dataclass(frozen=True)
class Gpu:
    """One CUDA device."""

    name: str
    memory: int
    free: int | None
    capability: str
    supported: bool  # whether this torch has kernels for it


@dataclass(frozen=True)
class Accelerators:
    """What there is beside the CPU."""

    gpus: tuple[Gpu, ...]
    mps: bool
    driver: str | None
    """NVIDIA's driver, as it names itself; None where there is none or it does not say."""
    unused: str | None  # why a GPU that seems to be here is not used


def read_torch() -> TorchBuild:
    """How torch was built, and what it makes of this CPU."""
    from ultrathink.training.hardware import bf16_instructions

    build = "CPU"
    if torch.version.cuda is not None:
        build = f"CUDA {torch.version.cuda}"
    elif torch.version.hip is not None:
        build = f"ROCm {torch.version.hip}"
    return TorchBuild(
        version=torch.__version__,
        build=build,
        threads=torch.get_num_threads(),
        instructions=torch.backends.cpu.get_cpu_capability(),
        bf16=told(bf16_instructions),
    )


def read_accelerators() -> Accelerators:
    """The GPUs, and why one that the system shows is left unused."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        has_cuda = torch.cuda.is_available()
    driver = told(_driver)
    unused = None
    if not has_cuda and (driver is not None or shutil.which("nvidia-smi") is not None):
        if torch.version.cuda is None and torch.version.hip is None:
            unused = "this torch was built without CUDA"
        else:
            unused = str(said[0].message).splitlines()[0] if said else "torch finds no CUDA device"
    return Accelerators(
        gpus=tuple(_gpus()) if has_cuda else (),
        mps=torch.backends.mps.is_available(),
        driver=driver,
        unused=unused,
    )


def _gpus() -> list[Gpu]:
    architectures = torch.cuda.get_arch_list()
    found = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        free = told(lambda index=index: torch.cuda.mem_get_info(index)[0])  # type: ignore[misc]
        found.append(
            Gpu(
                name=facts.name,
                memory=facts.total_memory,
                free=free,
                capability=f"{facts.major}.{facts.minor}",
                supported=torch.version.hip is not None
                or any(_runs(name, facts.major) for name in architectures),
            )
        )
    return found


def _runs(architecture: str, major: int) -> bool:
    """Whether code for sm_86 (binary) or compute_86 (portable) runs on that major version.

    https://docs.nvidia.com/cuda/cuda-c-programming-guide/#application-compatibility
    """
    kind, _, digits = architecture.partition("_")
    made_for = int("".join(filter(str.isdigit, digits)) or 0) // 10
    return made_for <= major if kind == "compute" else made_for == major


def _driver() -> str | None:
    if not _DRIVER_FILE.is_file():
        return None
    # "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar ..."
    words = _DRIVER_FILE.read_text(encoding="utf-8").splitlines()[0].split()
    return next((word for word in words if word[0].isdigit() and "." in word), None)
