"""One model over several processes, by PyTorch's FSDP2.

Every stage of ZeRO (https://arxiv.org/abs/1910.02054) is the same model with other habits. At rest
each process holds its share of every weight, and the optimizer sees shares only:

    stage   parameters gathered   gradients summed over processes
    1       once a step           once a step, after the last micro-batch
    2       once a step           after each micro-batch
    3       for each use          after each micro-batch

"Gathered once a step" means that they stay whole from the first forward pass that needs them to
the last backward pass; between steps nothing is whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
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
from ultrathink.model.transformer import Transformer
from ultrathink.parallel.timing import CommunicationClock, TimedAllGather, TimedReduceScatter


@dataclass(frozen=True)
class Accumulation:
    """What a model over several processes must be told before each micro-batch of a step."""

    model: FSDPModule
    zero_stage: int
    clock: CommunicationClock

    def before_micro_batch(self, is_last: bool) -> None:
        """Say whether the gradients of this micro-batch complete those of the step."""
        self.model.set_requires_all_reduce(is_last)
        if self.zero_stage == 1:
            self.model.set_requires_gradient_sync(is_last)
        if self.zero_stage < 3:
            self.model.set_reshard_after_backward(is_last)


def shard_model(
    model: Transformer,
    mesh: DeviceMesh,
    parallel: ParallelConfig,
    clock: CommunicationClock | None = None,
) -> Accumulation:
    """Divide ``model``, which lies whole and alike on every process, over ``mesh``, in place.

    Blocks are gathered one by one, in the precision of their products; embedding, last norm and
    head together and in that of the weights, because the embedding's gradient is a sum of many.
    Gradients are summed, not averaged: the loss is divided by the tokens of all processes already.
    A frozen model, which has no backward pass, gathers a block for each use; its embedding and head
    stay whole until ``release``. ``clock`` counts the time of exchanges; a new one where None.
    """
    clock = clock or CommunicationClock()
    is_frozen = not model.embedding.weight.requires_grad
    weight_dtype = model.embedding.weight.dtype
    offload = OffloadPolicy()
    if parallel.offload == "params":
        offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")

    def shard(module: torch.nn.Module, param_dtype: torch.dtype | None, *, frees: bool) -> None:
        sharded = fully_shard(
            module,
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

    products = model.compute_dtype if model.compute_dtype != weight_dtype else None
    for block in model.blocks:
        shard(block, products, frees=is_frozen or parallel.zero_stage == 3)
    shard(model, None, frees=not is_frozen and parallel.zero_stage == 3)
    return Accumulation(cast(FSDPModule, model), parallel.zero_stage, clock)


def is_divided(model: Transformer) -> bool:
    """Whether processes hold parts of a ``model``'s weights, which its passes gather."""
    return any(
        isinstance(weight, DTensor) and weight.to_local().numel() < weight.numel()
        for weight in model.parameters()
    )


def release(model: Transformer) -> None:
    """Free what passes of a ``model`` without backward passes have left gathered, if anything."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
