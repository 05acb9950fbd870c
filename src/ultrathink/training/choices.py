"""Resolves ``auto`` for this machine; each choice is written into the configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ultrathink.config.model import ModelConfig
from ultrathink.config.schema import Config
from ultrathink.config.size import sizes
from ultrathink.core.divisors import largest_divisor
from ultrathink.core.errors import ConfigError
from ultrathink.model.experts.products import GROUPED_MM_DTYPES, choose_expert_backend
from ultrathink.model.flops import flops_per_token
from ultrathink.parallel.mesh import ONE_PROCESS, ParallelDims
from ultrathink.parallel.world import ALONE, World
from ultrathink.training.attention_choice import choose_attention
from ultrathink.training.budget import planned_steps
from ultrathink.training.compiling import planned_seconds, refuse_selective, should_compile
from ultrathink.training.determinism import set_deterministic
from ultrathink.training.hardware import (
    DTYPES,
    Precision,
    choose_device,
    choose_precision,
    nominal_flops,
    peak_flops,
)

# Positions in one forward pass on a CPU; more does not fit the caches and is not faster.
_CPU_MICRO_TOKENS = 8192
# Bytes saved for the backward pass per position and layer, as multiples of the hidden size, for a
# block of the Llama family (Korthikanti et al., arXiv:2205.05198, eq. 2, without masks).
_ACTIVATION_FACTOR = 34
_MEMORY_SHARE = 0.6
_FROZEN_BYTES = 4  # per weight, at most, unless training is in fp64
_TRAINED_BYTES = 16  # per weight, with its gradient and two moments


@dataclass(frozen=True)
class Choices:
    """The part of a run that depends on the machine."""

    device: torch.device
    precision: Precision
    peak_flops: float
    warnings: tuple[str, ...]
    world: World = ALONE
    dims: ParallelDims = ONE_PROCESS


def choose_together(
    config: Config,
    samples_per_epoch: int | None,
    world: World,
    frozen: Sequence[ModelConfig] = (),
    beside: Callable[[Config], Sequence[ModelConfig]] = lambda config: (),
) -> tuple[Config, Choices]:
    """``choose`` on the first process of ``world``, and use its choices on all.

    ``frozen`` models and those trained ``beside`` the main one take memory too; the latter are
    built only if that matters. Raises ConfigError if the processes or the batch cannot be divided
    as configured.
    """
    dims = ParallelDims.resolve(config.parallel, world)
    share = dims.share(config.training.batch_size)
    if world.is_main:
        config, choices = choose(config, samples_per_epoch, share, frozen, beside)
    if world.size > 1:
        tree, origins = world.from_main([config.model_dump(mode="json"), config.origins])
        config = Config.model_validate(tree).with_origins(origins)
    if not world.is_main:
        config, choices = choose(config, samples_per_epoch, share, frozen)
    return config, replace(choices, world=world, dims=dims)


def choose(
    config: Config,
    samples_per_epoch: int | None,
    share: int | None = None,
    frozen: Sequence[ModelConfig] = (),
    beside: Callable[[Config], Sequence[ModelConfig]] = lambda config: (),
) -> tuple[Config, Choices]:
    """Replace every ``auto`` in ``config`` by a value for this machine, with a reason.

    With ``training.deterministic`` nothing is measured, since two runs could measure values on
    different sides of a threshold. ``samples_per_epoch`` is None if the data is not known.
    ``share`` is the number of sequences of a batch on this process, by default all.
    """
    training = config.training
    device = choose_device(training.device)
    set_deterministic(training.deterministic, device)
    precision, precision_reason = choose_precision(
        training.precision, device, measure=not training.deterministic
    )
    peak = peak_flops(device, precision)
    planned_flops = _planned_flops(config, samples_per_epoch)
    reckoned = nominal_flops(device, precision) if training.deterministic else peak
    compiled, compile_reason, is_warning = should_compile(
        training, device, planned_flops=planned_flops, peak_flops=reckoned
    )
    if compiled:
        refuse_selective(training.activation_checkpointing)
    chosen: dict[str, tuple[object, str]] = {}
    if training.device == "auto":
        chosen["training.device"] = (str(device), "the first available of cuda, mps, cpu")
    if training.precision == "auto":
        chosen["training.precision"] = (precision, precision_reason)
    if training.compile != compiled:
        chosen["training.compile"] = (compiled, compile_reason)
    if training.micro_batch_size == "auto":
        share = share or training.batch_size
        size = _micro_batch_size(config, device, share, frozen, beside)
        chosen["training.micro_batch_size"] = (size, "fits the device's memory")
    config = _replaced(config, chosen)
    if config.model.attention.backend == "auto":
        planned_s = planned_seconds(training, planned_flops, reckoned)
        backend = choose_attention(config, DTYPES[precision], device, planned_s)
        config = _replaced(config, {"model.attention.backend": backend})
    config = _with_expert_backend(config, device, DTYPES[precision])
    warnings = (f"training.compile: {compile_reason}.",) if is_warning else ()
    return config, Choices(device, precision, peak, warnings)


def _with_expert_backend(config: Config, device: torch.device, dtype: torch.dtype) -> Config:
    """``config`` with the kernel of its experts, if any; ConfigError if the kernel cannot run."""
    if config.model.moe is None:
        return config
    name = config.model.moe.backend
    if name == "auto":
        chosen = choose_expert_backend(device.type, dtype)
        reason = f"the fastest for {device.type} in {str(dtype).removeprefix('torch.')}"
        return _replaced(config, {"model.moe.backend": (chosen, reason)})
    if name == "grouped_mm" and dtype not in GROUPED_MM_DTYPES:
        raise ConfigError(
            f"model.moe.backend = 'grouped_mm' takes fp32 or bf16, but training.precision is "
            f"{config.training.precision}; use model.moe.backend=auto."
        )
    return config


def _replaced(config: Config, chosen: Mapping[str, tuple[object, str]]) -> Config:
    """``config`` with each chosen value and its reason."""
    for key, (value, reason) in chosen.items():
        config = config.replace({key: value}, origin=f"chosen at run time: {reason}")
    return config


def _planned_flops(config: Config, samples_per_epoch: int | None) -> float | None:
    training = config.training
    if training.epochs and training.step_budget is None and samples_per_epoch is None:
        return None
    tokens_per_step = training.batch_size * config.data.seq_len
    steps = planned_steps(training, tokens_per_step, samples_per_epoch or 0)
    if steps is None:
        return None
    return steps * tokens_per_step * flops_per_token(config.model, config.data.seq_len)


def _micro_batch_size(
    config: Config,
    device: torch.device,
    share: int,
    frozen: Sequence[ModelConfig],
    beside: Callable[[Config], Sequence[ModelConfig]],
) -> int:
    """The largest divisor of this process's share of the batch whose activations fit.

    A frozen model takes its weights and the activations of one layer at a time; a model trained
    ``beside`` the main one takes those of all layers.
    """
    seq_len = config.data.seq_len
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        if config.training.deterministic:  # free memory differs from run to run
            free = total
        others = beside(config)
        layers = sum(one.hidden_size * one.num_layers for one in (config.model, *others))
        layers += sum(one.hidden_size for one in frozen)
        free -= sum(sizes(one).total * _FROZEN_BYTES for one in frozen)
        free -= sum(sizes(one).total * _TRAINED_BYTES for one in others)
        most = int(free * _MEMORY_SHARE / (_ACTIVATION_FACTOR * layers * seq_len))
    else:
        most = _CPU_MICRO_TOKENS // seq_len
    return largest_divisor(share, most)
