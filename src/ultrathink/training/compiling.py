"""Compiling the training step: when it pays, and where the compiled code is kept."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ultrathink.config.training import TrainingConfig

# What compiling costs at the start, and what share of a step it saves: seen with the shape of the
# preset `demo` on two CPU cores (33 s; 163 ms forward and backward became 113). They only steer
# the choice of `auto`.
_COMPILE_S = 33.0
_SAVED_SHARE = 0.3
_EAGER_UTILIZATION = 0.3


def should_compile(
    training: TrainingConfig,
    device: torch.device,
    *,
    planned_flops: float | None,
    peak_flops: float,
) -> tuple[bool, str, bool]:
    """Whether to compile, why, and whether the reason is worth a warning.

    ``planned_flops`` is the work of the whole run, None where its length is given in minutes.
    """
    if training.compile is False:
        return False, "as configured", False
    if device.type == "cpu" and not has_cpp_compiler():
        return False, "no C++ compiler was found (install g++ or clang); training runs eager", True
    if training.compile is True:
        return True, "as configured", False
    if training.max_minutes is not None:
        planned_s = training.max_minutes * 60
    else:
        assert planned_flops is not None
        planned_s = planned_flops / (_EAGER_UTILIZATION * peak_flops)
    pays = planned_s * _SAVED_SHARE > _COMPILE_S
    return pays, f"the run would take about {planned_s:.0f} s uncompiled", False


def has_cpp_compiler() -> bool:
    """Whether the compiler that torch would call exists."""
    wanted = os.environ.get("CXX")
    candidates = (wanted,) if wanted else ("g++", "clang++", "c++")
    return any(shutil.which(name) is not None for name in candidates)


def compile_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` compiled as one graph with fixed shapes; the code is kept between runs."""
    home = os.environ.get("ULTRATHINK_CACHE") or Path.home() / ".cache" / "ultrathink"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(home) / "compiled"))
    compiled: Callable[..., Any] = torch.compile(function, fullgraph=True, dynamic=False)
    return compiled
