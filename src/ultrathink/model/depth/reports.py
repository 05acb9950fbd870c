"""What depth routing reports of a forward pass: losses, and statistics of L layers.

Shapes: B rows of a batch, T tokens, N = B * T, L layers that reported.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ultrathink.model.depth.router import DepthPass, LayerDepth, by_place

PREFIX = "depth_"
PREDICTOR_LOSS = "mod_predictor"
_NOT_STATISTICS = ("loss", "chosen")


def reported_depths(
    layers: Sequence[LayerDepth], depth: DepthPass | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The predictors' loss, and statistics as ``LayerDepth`` has them, stacked to ``[L, ...]``.

    ``depth_at_place`` ``[T]`` are the counted tokens at each position.
    """
    if not layers or depth is None:
        return {}, {}
    of_predictors = [layer.loss for layer in layers if layer.loss is not None]
    losses = {PREDICTOR_LOSS: torch.stack(of_predictors).sum(0)} if of_predictors else {}
    stats = {
        f"{PREFIX}{name}": torch.stack([getattr(layer, name) for layer in layers]).detach()
        for name in LayerDepth._fields
        if name not in _NOT_STATISTICS
    }
    stats[f"{PREFIX}at_place"] = by_place(depth.sequences.counted[..., 0], depth)
    return losses, stats


def choices_of(layers: Sequence[LayerDepth]) -> Tensor | None:
    """``[N, L + 1]``: 1 for tokens that each layer chose, and for all; None without layers."""
    if not layers:
        return None
    chosen = [layer.chosen.flatten() for layer in layers]
    return torch.stack([*chosen, torch.ones_like(chosen[0])], -1)
