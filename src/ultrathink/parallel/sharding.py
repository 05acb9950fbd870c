"""Shards modules over several processes with PyTorch's FSDP2.

All stages of ZeRO (https://arxiv.org/abs/1910.02054) use the same sharded module. Between steps
each process holds its shard of every weight, and the optimizer sees only shards:

    stage   parameters gathered   gradients summed over processes
    1       once per step         once per step, after the last micro-batch
    2       once per step         after each micro-batch
    3       for each use          after each micro-batch

"Gathered once per step" means that weights stay gathered from the first forward pass that needs
them to the last backward pass of the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from ultrathink.config.parallel import ParallelConfig
from ultrathink.model.transformer import transformers_in
from ultrathink.parallel.timing import CommunicationClock, TimedAllGather, TimedReduceScatter


@dataclass(frozen=True)
class Accumulation:
    """Controls when a sharded module sums gradients over the micro-batches of a step."""

    module: FSDPModule
    zero_stage: int
    clock: CommunicationClock

    def before_micro_batch(self, is_last: bool) -> None:
        """Announce a micro-batch, and whether it is the last of the step."""
        self.module.set_requires_all_reduce(is_last)
        if self.zero_stage == 1:
            self.module.set_requires_gradient_sync(is_last)
        if self.zero_stage < 3:
            self.module.set_reshard_after_backward(is_last)


def shard_module(
    module: nn.Module, mesh: DeviceMesh, parallel: ParallelConfig, clock: CommunicationClock
) -> Accumulation:
    """Shard ``module``, which is unsharded and equal on every process, over ``mesh``, in place.

    Blocks of a Transformer, and the experts of each, are gathered one by one, in the precision of
    their products; embedding, last norm and head together, in the precision of the weights, because
    the embedding's gradient is a sum of many terms. Other modules are gathered as a whole.
    Gradients are summed, not averaged: the loss is already divided by the tokens of all processes.
    A frozen model, which has no backward pass, gathers a block for each use; its embedding and head
    stay gathered until ``release``. ``clock`` counts the time of communication.
    """
    is_frozen = not any(parameter.requires_grad for parameter in module.parameters())
    weight_dtype = next(module.parameters()).dtype
    offload = OffloadPolicy()
    if parallel.offload == "params":
        offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")

    def shard(part: nn.Module, param_dtype: torch.dtype | None, *, frees: bool) -> None:
        sharded = fully_shard(
            part,
            mesh=mesh,
            reshard_after_forward=frees,
            mp_policy=MixedPrecisionPolicy(
                param_dtype=param_dtype, reduce_dtype=weight_dtype, cast_forward_inputs=False
            ),
            offload_policy=offload,
        )
        sharded.set_custom_all_gather(TimedAllGather(clock))
        sharded.set_custom_reduce_scatter(TimedReduceScatter(clock))
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)

    models = transformers_in(module)
    for model in models:
        products = model.compute_dtype if model.compute_dtype != weight_dtype else None
        frees = is_frozen or parallel.zero_stage == 3
        for layer in model.expert_layers().values():
            shard(layer.experts, products, frees=frees)
        for block in model.blocks:
            shard(block, products, frees=frees)
    for part in dict.fromkeys([*models, module]):
        shard(part, None, frees=not is_frozen and parallel.zero_stage == 3)
    return Accumulation(cast(FSDPModule, module), parallel.zero_stage, clock)


def is_divided(module: nn.Module) -> bool:
    """Whether the weights of ``module`` are sharded, so that its passes gather them."""
    return any(
        isinstance(weight, DTensor) and weight.to_local().numel() < weight.numel()
        for weight in module.parameters()
    )


def release(module: nn.Module) -> None:
    """Free weights that forward passes without backward passes have left gathered."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
