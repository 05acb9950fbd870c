"""One process's shard of a tensor that is divided among several processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import torch
    from torch import Tensor


# Which part of a tensor to read, from its name and shape: offset and size, or None for all of it.
Region: TypeAlias = Callable[[str, tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]] | None]


@dataclass(frozen=True)
class TensorShard:
    """``local`` at ``offset`` in a tensor of ``shape``; None if other processes write all of it."""

    local: Tensor | None
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
