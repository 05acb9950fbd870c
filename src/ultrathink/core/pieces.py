"""A part of a tensor that several processes hold together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """``local`` lies at ``offset`` in a tensor of ``shape``; None where others hold it all."""

    local: Tensor | None
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
