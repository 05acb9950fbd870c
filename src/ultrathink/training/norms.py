"""Gradient norms by layer, and the size of an update relative to the weights, for logged steps."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ultrathink.model.transformer import Transformer

_LAYER = re.compile(r"(?:^|\.)blocks\.(\d+)\.")


class LayerNorms:
    """Measures the gradient of each layer, and the update of the middle one.

    Measuring an update needs a copy of the weights before it; one layer's copy is small.
    """

    def __init__(self, model: Transformer) -> None:
        self._layers: dict[int, list[Tensor]] = {}
        for name, parameter in model.named_parameters():
            match = _LAYER.search(name)
            if match is not None and parameter.requires_grad:
                self._layers.setdefault(int(match[1]), []).append(parameter)
        numbers = sorted(self._layers)
        self._middle = self._layers[numbers[len(numbers) // 2]] if numbers else []
        self._before: list[Tensor] = []

    def before_update(self) -> dict[str, float]:
        """Returns ``grad_norm/layer_<i>`` of every layer, and copies the middle layer's weights."""
        norms = {
            f"grad_norm/layer_{number}": total_norm(
                [p.grad for p in parameters if p.grad is not None]
            ).item()
            for number, parameters in self._layers.items()
        }
        self._before = [parameter.detach().clone() for parameter in self._middle]
        return norms

    @torch.no_grad()
    def after_update(self) -> dict[str, float]:
        """``update_ratio``: the norm of the middle layer's update over that of its weights."""
        before, self._before = self._before, []
        if not before:
            return {}
        moved = [now - then for now, then in zip(self._middle, before, strict=True)]
        size = total_norm(before).item()
        return {"update_ratio": total_norm(moved).item() / size} if size else {}


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of all tensors together, over all processes that hold shards of them."""
    norm = torch.nn.utils.get_total_norm(tensors)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
