"""Compiles the training step, if that pays, and caches the compiled code."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn

from ultrathink.config.training import TrainingConfig
from ultrathink.core.errors import ConfigError
from ultrathink.data.cache import cache_folder
from ultrathink.model.block import Block
from ultrathink.model.transformer import Transformer

Function = TypeVar("Function", bound=Callable[..., Any])

# Cost of compilation at the start, and share of a step that it saves, measured with the preset
# `demo` on two CPU cores (33 s; forward and backward went from 163 to 113 ms). Only for `auto`.
_COMPILE_S = 33.0
_SAVED_SHARE = 0.3
_EAGER_UTILIZATION = 0.3

RECOMPILE_LIMIT = 64


def should_compile(
    training: TrainingConfig,
    device: torch.device,
    *,
    planned_flops: float | None,
    peak_flops: float,
) -> tuple[bool, str, bool]:
    """Whether to compile, why, and whether the reason deserves a warning.

    ``planned_flops`` is the work of the whole run; None if its length is given in minutes or
    depends on data that is not known.
    """
    if training.compile is False:
        return False, "as configured", False
    if device.type == "cpu":
        problem = compiler_problem()
        if problem is not None:
            return False, f"{problem}; training runs eager", True
    if training.compile is True:
        return True, "as configured", False
    planned_s = planned_seconds(training, planned_flops, peak_flops)
    if planned_s is None:
        return False, "the length of the run is known only once its data is read", False
    pays = planned_s * _SAVED_SHARE > _COMPILE_S
    at_rate = f" at a nominal {peak_flops / 1e9:.0f} GFLOP/s" if training.deterministic else ""
    return pays, f"the run would take about {planned_s:.0f} s uncompiled{at_rate}", False


def planned_seconds(
    training: TrainingConfig, planned_flops: float | None, peak_flops: float
) -> float | None:
    """Rough duration of a run without compilation; None if its length is not known yet."""
    if training.max_minutes is not None:
        return training.max_minutes * 60
    if planned_flops is None:
        return None
    return planned_flops / (_EAGER_UTILIZATION * peak_flops)


def find_cpp_compiler() -> str | None:
    """The path of the C++ compiler: ``$CXX``, else the first one found."""
    wanted = os.environ.get("CXX")
    candidates = (wanted,) if wanted else ("g++", "clang++")
    return next((path for path in map(shutil.which, candidates) if path is not None), None)


def compiler_problem() -> str | None:
    """What is missing to compile for the CPU, and how to get it; None if nothing is."""
    if find_cpp_compiler() is None:
        wanted = os.environ.get("CXX")
        if wanted:
            return f"no C++ compiler was found (CXX is {wanted!r}; unset it, or install that)"
        return "no C++ compiler was found (install g++ or clang)"
    include = Path(sysconfig.get_path("include"))
    if sys.platform == "linux" and not (include / "Python.h").is_file():
        return (
            f"the headers of Python are not in {include} (install python3-dev, or the package of "
            f"that kind which belongs to this Python)"
        )
    return None


def refuse_selective(checkpointing: str) -> None:
    """ConfigError if a compiled run is to use selective activation checkpointing."""
    if checkpointing == "selective":
        raise ConfigError(
            "training.activation_checkpointing = 'selective': a compiled step recomputes what is "
            "cheap by itself, and would hold more than with none; use full, none, or "
            "training.compile=false."
        )


def compile_cache_folder() -> Path:
    """The folder of the compiled code, kept between runs."""
    named = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    return Path(named) if named else cache_folder(None) / "compiled"


def compile_function(function: Function) -> Function:
    """``function`` compiled as one graph with fixed shapes; the code is cached between runs."""
    _prepare_compiler()
    compiled: Any = torch.compile(function, fullgraph=True, dynamic=False)
    return compiled  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Compilation:
    """Which parts are compiled: whole passes, or each block and head separately if processes
    exchange weights between blocks."""

    is_on: bool
    by_blocks: bool = False

    def of_pass(self, function: Function) -> Function:
        """``function``, from token ids to losses, compiled if whole passes are compiled."""
        return compile_function(function) if self.is_on and not self.by_blocks else function

    def of_head(self, function: Function) -> Function:
        """``function``, the loss of a head, compiled if blocks are compiled separately."""
        return compile_function(function) if self.is_on and self.by_blocks else function

    def of_model(self, model: Transformer) -> None:
        """Compile the blocks of ``model`` and the loss of its head in place, if separately."""
        if not (self.is_on and self.by_blocks):
            return
        # Methods, not modules: the modules' hooks gather weights, and torch.compile's prefix must
        # not reach checkpoints.
        for block in model.blocks:
            is_frozen = not any(parameter.requires_grad for parameter in block.parameters())
            for module, name in cast(Block, block).hook_free_parts():
                compiled = compile_function if is_frozen else partial(_while_training, module)
                setattr(module, name, compiled(getattr(module, name)))
        model.head_loss = _while_training(model, model.head_loss)  # type: ignore[method-assign]


EAGER = Compilation(is_on=False)


def _while_training(module: nn.Module, method: Callable[..., Any]) -> Callable[..., Any]:
    """``method``, compiled in training mode only: validation has batches of many shapes."""
    compiled = compile_function(method)

    def call(*args: Any, **options: Any) -> Any:
        return (compiled if module.training else method)(*args, **options)

    return call


def _prepare_compiler() -> None:
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor

    # Each compute path is a graph of its own. At the limit a whole graph raises an error.
    dynamo.recompile_limit = RECOMPILE_LIMIT
    # Recompute in the backward pass what fuses into its kernels (norms, activations, casts of
    # weights): saves 100 of 1,360 MiB at shape M of the benchmarks, and costs 2% of a step.
    functorch.ban_recompute_materialized_backward = False
    # Without this a graph with custom autograd functions is traced again in every process (3 s
    # for `demo`). Their bodies are part of the cache key.
    functorch.autograd_cache_allow_custom_autograd_functions = True
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(compile_cache_folder())
    compiler = find_cpp_compiler()
    if compiler is not None and shutil.which(inductor.cpp.cxx[-1]) is None:
        inductor.cpp.cxx = (None, compiler)  # torch looks for a single name
