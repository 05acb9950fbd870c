"""Random thinning of a training pass: layers that a sequence skips, experts that it does without.

Layer dropout after https://arxiv.org/abs/2404.16710 (LayerSkip), numbers of experts by layer after
https://arxiv.org/abs/2509.26520 (Matryoshka MoE). A skipped layer is computed and not used, so that
every process and every sequence runs the same operations.

Shapes: B sequences, L layers of the model.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Thinning(NamedTuple):
    """What each sequence does without in one pass."""

    keep: Tensor
    """Boolean ``[B, L]``: false where a sequence skips a layer."""

    width: Tensor
    """``[B, L]``: share, above 0, of the experts of a path that a sequence's tokens are sent to in
    a layer; at least one of each group."""


def skipped(keep: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """``after`` ``[B, T, C]`` for the sequences that ``keep`` ``[B]`` a layer, else ``before``."""
    return torch.where(keep[:, None, None], after, before)


def layer_dropout(layer: int, num_layers: int, maximum: float) -> float:
    """The probability that a sequence skips ``layer``: 0 in the first, ``maximum`` in the last.

    ``maximum * (2^(l / (L - 1)) - 1)``.
    """
    return maximum * (2 ** (layer / max(1, num_layers - 1)) - 1)
