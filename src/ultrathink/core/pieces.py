"""A part of a tensor that several processes hold together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import torch
    from torch import Tensor


# Which part of a tensor, by its name and shape, is asked for: offset and size; None: all of it.
Region: TypeAlias = Callable[[str, tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]] | None]


@dataclass(frozen=True)
class Piece:
    """``local`` lies at ``offset`` in a tensor of ``shape``; None where others hold it all."""

    local: Tensor | None
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
