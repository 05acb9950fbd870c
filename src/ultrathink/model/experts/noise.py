"""Random numbers for routing, drawn only if needed.

Each is a custom operator, so that a disabled one costs nothing even in a compiled step. On a GPU
the numbers are always drawn: asking whether they are needed would synchronize.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op(
    "ultrathink::uniform_noise", mutates_args=(), tags=torch.Tag.nondeterministic_seeded
)
def _uniform_noise(like: Tensor, amount: Tensor) -> Tensor:
    if amount.device.type == "cpu" and amount.item() == 0:
        return torch.zeros_like(like)
    return (2 * torch.rand_like(like) - 1) * amount.to(like)


@_uniform_noise.register_fake
def _(like: Tensor, amount: Tensor) -> Tensor:
    return torch.empty_like(like)


def uniform_noise(like: Tensor, amount: Tensor) -> Tensor:
    """Numbers between -amount and amount, of the shape and dtype of ``like``."""
    noise: Tensor = _uniform_noise(like.detach(), amount)
    return noise


@torch.library.custom_op("ultrathink::within_capacity", mutates_args=())
def _within_capacity(
    scores: Tensor, chosen: Tensor, first: Tensor, shares: Tensor, factor: Tensor
) -> Tensor:
    if factor.device.type == "cpu" and factor.isinf().item():
        return chosen.clone()
    ranked = torch.where(chosen, scores, -torch.inf)
    by_score = ranked.argsort(dim=1, descending=True, stable=True)
    begins = first[..., None].expand_as(by_score)
    by_sequence = begins.gather(1, by_score).argsort(dim=1, stable=True)
    order = by_score.gather(1, by_sequence)  # sorted within each sequence
    places = torch.arange(order.shape[1], device=order.device)[None, :, None].expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places) - begins
    # Minus a rounding error, so that 1.1 times 10 is 11.
    return chosen & (rank < (shares * factor * (1 - 1e-6)).ceil())


@_within_capacity.register_fake
def _(scores: Tensor, chosen: Tensor, first: Tensor, shares: Tensor, factor: Tensor) -> Tensor:
    return torch.empty_like(chosen)


def within_capacity(
    scores: Tensor, chosen: Tensor, first: Tensor, shares: Tensor, factor: Tensor
) -> Tensor:
    """Which of its ``chosen`` tokens each expert takes: those with the highest scores.

    ``scores`` and boolean ``chosen`` are ``[B, T, E]``, ``first`` int64 ``[B, T]`` the first token
    of each token's sequence, ``shares`` ``[B, S, E]`` the even share of that sequence's tokens (S
    is T, or 1 where rows are sequences). An expert takes ``factor`` times that of each sequence,
    rounded up. Of equal scores the earlier token is taken.
    """
    kept: Tensor = _within_capacity(scores.detach(), chosen, first, shares, factor)
    return kept
