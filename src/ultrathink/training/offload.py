"""The optimizer's state in the memory of the host: ZeRO-Offload, https://arxiv.org/abs/2101.06840."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ultrathink.parallel.placement import on_host
from ultrathink.training.optimizers import Optimizers


class HostCopies:
    """Copies of the weights on the CPU, which optimizers move in place of the weights themselves.

    What an optimizer remembers then lies beside the copies. ``parameters`` are the weights by name;
    ``names`` are those of the weights that the copies stand for.
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
        """Give the copies the gradients of the weights."""
        for weight, copy in self._pairs:
            copy.grad = None if weight.grad is None else _on_host(weight.grad)

    @torch.no_grad()
    def give_weights(self) -> None:
        """Give the weights the values of the copies."""
        for weight, copy in self._pairs:
            _local(weight).copy_(_local(copy), non_blocking=True)
            copy.grad = None

    @torch.no_grad()
    def take_weights(self) -> None:
        """Give the copies the values of the weights, after those were loaded."""
        for weight, copy in self._pairs:
            _local(copy).copy_(_local(weight))

    def _copy(self, weight: nn.Parameter, names: dict[nn.Parameter, str]) -> Tensor:
        copy = _on_host(weight.detach()).requires_grad_()
        self._pairs.append((weight, copy))
        self.names[copy] = names[weight]
        return copy


def _on_host(tensor: Tensor) -> Tensor:
    """A copy of ``tensor`` on the CPU, divided among the processes as it is."""
    copy = _local(tensor).to("cpu", copy=True)
    return on_host(copy, tensor) if isinstance(tensor, DTensor) else copy


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
