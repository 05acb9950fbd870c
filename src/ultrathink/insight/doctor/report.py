"""The findings of ``ultrathink doctor`` as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from ultrathink.insight.doctor.machine import Folder, Memory, Processor

if TYPE_CHECKING:  # these import torch and others, which may be what is broken
    from ultrathink.insight.doctor.accelerators import Accelerators, TorchBuild
    from ultrathink.insight.doctor.packages import Package
    from ultrathink.insight.doctor.speed import Sharing, Speed
    from ultrathink.insight.doctor.toolchain import Toolchain

Level = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Problem:
    """Something that prevents training (error), slows it (warning), or could be better (note)."""

    level: Level
    text: str
    fix: str | None  # None where the text has it


@dataclass(frozen=True)
class Choice:
    """A setting that the machine decides where it is ``auto``."""

    key: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Run:
    """What the findings need to know of the configuration."""

    config: str  # as named on the command line
    parameters: int
    state_bytes: int  # weights, gradients and optimizer state, without activations
    checkpoint_bytes: int  # of one checkpoint, at most
    checkpoints_kept: int
    """On the disk at the same time, the one being written and the best included."""
    may_compile: bool


@dataclass(frozen=True)
class Diagnosis:
    """All findings; None for what could not be read or was not measured."""

    versions: dict[str, str]  # ultrathink, python, its executable, platform
    run: Run
    processor: Processor
    memory: Memory
    environment: dict[str, str]
    run_folder: Folder
    cache_folder: Folder
    packages: tuple[Package, ...] | None
    load_average: float | None = None
    disk_rate: float | None = None  # bytes a second written to the disk of the run folder
    torch: TorchBuild | None = None
    torch_error: str | None = None
    accelerators: Accelerators | None = None
    toolchain: Toolchain | None = None
    cpu_speed: Speed | None = None
    device_speed: Speed | None = None  # of the GPU that ``auto`` chooses, if any
    sharing: Sharing | None = None
    choices: tuple[Choice, ...] = ()
    choice_error: str | None = None
    problems: tuple[Problem, ...] = ()

    @property
    def can_train(self) -> bool:
        """Whether no problem prevents training."""
        return not any(problem.level == "error" for problem in self.problems)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        processor = {**asdict(self.processor), "usable_cores": self.processor.usable_cores}
        return {"can_train": self.can_train, **asdict(self), "processor": processor}
