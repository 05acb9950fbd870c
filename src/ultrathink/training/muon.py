"""Muon: momentum with orthogonalized update matrices.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024),
https://kellerjordan.github.io/posts/muon/. Shapes: ``N`` matrices of one shape ``[R, C]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ultrathink.parallel.placement import placed_like

# Coefficients of the quintic iteration of the post above: singular values end near 1, not at 1.
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalize(matrices: Tensor, num_iterations: int = 5) -> Tensor:
    """Approximately the nearest semi-orthogonal matrices of a batch ``[N, R, C]``.

    It computes in bf16, which is enough, and for fp64 matrices in fp64, for tests.

    Newton-Schulz iteration on X / ‖X‖: X ← aX + (bA + cA²)X with A = XXᵀ.
    """
    x = matrices.to(matrices.dtype if matrices.dtype == torch.float64 else torch.bfloat16)
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT
    x = x / (matrices.norm(dim=(-2, -1), keepdim=True).to(x.dtype) + 1e-7)
    x = x.contiguous()
    for _ in range(num_iterations):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C)
        x = torch.baddbmm(x, polynomial, x, beta=_A)
    return x.mT if is_tall else x


def _orthogonalize_together(matrices: Tensor, num_iterations: int) -> Tensor:
    """``orthogonalize`` on all processes, which hold the same matrices: each does its share."""
    size, rank = dist.get_world_size(), dist.get_rank()
    share = -(-len(matrices) // size)
    padding = matrices.new_zeros(share * size - len(matrices), *matrices.shape[1:])
    mine = torch.cat([matrices, padding])[rank * share : (rank + 1) * share]
    done = orthogonalize(mine, num_iterations).contiguous()
    everyones = done.new_empty(share * size, *done.shape[1:])
    dist.all_gather_single(everyones, done)
    return everyones[: len(matrices)]


class Muon(torch.optim.Optimizer):
    """Muon for matrices; those of the same shape are orthogonalized in one batch.

    A parameter ``[E, R, C]`` is E matrices. ``row_splits`` maps a parameter to the row counts of
    the matrices stacked in it (a fused query-key-value projection holds three); each is
    orthogonalized separately. The step is scaled by √max(1, R/C), so that one learning rate works
    for every shape.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        num_iterations: int = 5,
        row_splits: dict[Tensor, Sequence[int]] | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "num_iterations": num_iterations,
        }
        super().__init__(params, defaults)
        self.row_splits = dict(row_splits or {})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim not in (2, 3):
                    raise ValueError(
                        f"Muon updates matrices; got a parameter of shape {tuple(parameter.shape)}"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        by_shape: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}  # [n, R, C] each
        divided: list[tuple[DTensor, Tensor]] = []  # with their full updates
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            update = self._momentum(parameter, group["momentum"])
            if group["weight_decay"]:
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
            moved = parameter
            if isinstance(update, DTensor):  # only full matrices can be orthogonalized
                update = update.full_tensor()
                moved = torch.zeros_like(update)
                divided.append((parameter, moved))
            if parameter.ndim == 2:
                moved, update = moved[None], update[None]
            rows = list(self.row_splits.get(parameter, (parameter.shape[-2],)))
            for weight, part in zip(moved.split(rows, 1), update.split(rows, 1), strict=True):
                by_shape.setdefault(tuple(weight.shape[1:]), []).append((weight, part))
        for (rows_, columns), members in by_shape.items():
            stacked = torch.cat([part for _, part in members])
            orthogonal = _orthogonalize_together if divided else orthogonalize
            directions = orthogonal(stacked, group["num_iterations"])
            scale = group["lr"] * max(1.0, rows_ / columns) ** 0.5
            numbers = [len(weight) for weight, _ in members]
            for (weight, _), direction in zip(members, directions.split(numbers), strict=True):
                weight.add_(direction.to(weight.dtype), alpha=-scale)
        for parameter, change in divided:
            parameter.add_(placed_like(change, parameter))

    @staticmethod
    def zero_state(parameter: Tensor) -> dict[str, Tensor]:
        """The state of a parameter before its first step."""
        return {"momentum": torch.zeros_like(parameter)}

    def _momentum(self, parameter: Tensor, momentum: float) -> Tensor:
        """Update the running mean of the gradient; returns the Nesterov look-ahead."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state.update(self.zero_state(parameter))
        buffer: Tensor = state["momentum"]
        buffer.lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(buffer, momentum)
