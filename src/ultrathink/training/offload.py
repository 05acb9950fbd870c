"""The optimizer's state in host memory: ZeRO-Offload, https://arxiv.org/abs/2101.06840."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ultrathink.parallel.placement import on_host
from ultrathink.training.optimizers import Optimizers


class HostCopies:
    """Copies of the weights on the CPU, which optimizers update in place of the weights.

    The optimizer's state is then on the CPU too. ``parameters`` are the weights by name; ``names``
    maps each copy to the name of its weight.
    """

    def __init__(self, optimizers: Optimizers, parameters: Mapping[str, nn.Parameter]) -> None:
        names = {parameter: name for name, parameter in parameters.items()}
        self.names: dict[Tensor, str] = {}
        self._pairs: list[tuple[nn.Parameter, Tensor]] = []
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["params"] = [self._copy(weight, names) for weight in group["params"]]

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Copy the gradients of the weights to the copies."""
        for weight, copy in self._pairs:
            copy.grad = None if weight.grad is None else _on_host(weight.grad)

    @torch.no_grad()
    def give_weights(self) -> None:
        """Copy the values of the copies to the weights."""
        for weight, copy in self._pairs:
            _local(weight).copy_(_local(copy), non_blocking=True)
            copy.grad = None

    @torch.no_grad()
    def take_weights(self) -> None:
        """Copy the values of the weights, after loading them, to the copies."""
        for weight, copy in self._pairs:
            _local(copy).copy_(_local(weight))

    def _copy(self, weight: nn.Parameter, names: dict[nn.Parameter, str]) -> Tensor:
        copy = _on_host(weight.detach()).requires_grad_()
        self._pairs.append((weight, copy))
        self.names[copy] = names[weight]
        return copy


def _on_host(tensor: Tensor) -> Tensor:
    """A copy of ``tensor`` on the CPU, sharded in the same way."""
    copy = _local(tensor).to("cpu", copy=True)
    return on_host(copy, tensor) if isinstance(tensor, DTensor) else copy


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
