"""Section ``training.optimizer`` and ``training.schedule``: how weights move."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from ultrathink.config.base import DurationField, PartConfig, PartOf
from ultrathink.config.options import felt
from ultrathink.core.durations import Duration
from ultrathink.core.registry import Registry

OPTIMIZERS: Registry[Any] = Registry("optimizer")
SCHEDULES: Registry[Any] = Registry("schedule")

DecayRate = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(PartConfig):
    """What every optimizer has."""

    lr: float = felt(3e-4, gt=0)
    """Peak learning rate."""
    weight_decay: float = felt(0.1, ge=0)
    """Decoupled weight decay; norms and biases are never decayed."""


class AdamWConfig(OptimizerConfig):
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101), fused where torch can."""

    type: Literal["adamw"] = "adamw"
    betas: tuple[DecayRate, DecayRate] = felt((0.9, 0.95))
    """Decay rates of the two moments, each between 0 and 1."""
    eps: float = felt(1e-8, gt=0)
    """Constant beside the root of the second moment."""


class MuonConfig(OptimizerConfig):
    """Muon (Jordan et al., 2024) for hidden matrices, AdamW for everything else."""

    type: Literal["muon"] = "muon"
    lr: float = felt(0.012, gt=0)
    """Peak learning rate of the hidden matrices."""
    weight_decay: float = felt(0.0, ge=0)
    """Decoupled weight decay; norms and biases are never decayed."""
    momentum: float = felt(0.95, ge=0, lt=1)
    """Nesterov momentum of Muon."""
    num_iterations: int = felt(5, ge=1, le=20)
    """Newton-Schulz iterations."""
    experts: Literal["muon", "adamw"] = felt("muon")
    """What moves the matrices of experts: muon, or adamw (at adamw_lr), which takes a fraction of
    the time where there are many."""
    adamw_lr: float = felt(0.008, gt=0)
    """Peak learning rate of embeddings, head, norms and biases."""
    betas: tuple[DecayRate, DecayRate] = felt((0.9, 0.95))
    """Decay rates of AdamW's moments."""
    eps: float = felt(1e-8, gt=0)
    """Constant of AdamW."""


OPTIMIZERS.add("adamw", "ultrathink.training.optimizers:build_adamw", options=AdamWConfig)
OPTIMIZERS.add("muon", "ultrathink.training.optimizers:build_muon", options=MuonConfig)
OptimizerField = Annotated[OptimizerConfig, PartOf(OPTIMIZERS)]


class ScheduleConfig(PartConfig):
    """What every schedule has."""

    warmup: DurationField = felt(Duration(0.05, "ratio"))
    """Linear warm-up: steps (100), a share of the run (0.05 or 5%), tokens ('2M tokens') or minutes
    ('1 minute')."""
    min_ratio: float = felt(0.1, ge=0, le=1)
    """Learning rate at the end, as a share of the peak."""


class CosineConfig(ScheduleConfig):
    """Half a cosine from the peak to the end (Loshchilov and Hutter, arXiv:1608.03983)."""

    type: Literal["cosine"] = "cosine"


class WsdConfig(ScheduleConfig):
    """Warm-up, stable, decay (Hu et al., arXiv:2404.06395)."""

    type: Literal["wsd"] = "wsd"
    min_ratio: float = felt(0.0, ge=0, le=1)
    """Learning rate at the end, as a share of the peak."""
    decay: DurationField = felt(Duration(0.2, "ratio"))
    """Length of the decay, in the units of warmup."""
    shape: Literal["linear", "sqrt"] = felt("linear")
    """Course of the decay: linear, or 1 - √progress."""


SCHEDULES.add("cosine", "ultrathink.training.schedules:cosine_factor", options=CosineConfig)
SCHEDULES.add("wsd", "ultrathink.training.schedules:wsd_factor", options=WsdConfig)
ScheduleField = Annotated[ScheduleConfig, PartOf(SCHEDULES)]
