"""Keys and values of the tokens read so far, so that decoding computes only the new ones.

Shapes: B batch, K key/value heads, S positions that fit, T new tokens, D head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ultrathink.core.errors import UltrathinkError


class CacheFullError(UltrathinkError):
    """More tokens than the cache was made for."""


class KVCache:
    """Preallocated keys and values, one pair ``[B, K, S, D]`` for each layer.

    ``length`` counts the positions that are filled. A forward pass calls ``begin`` once, ``update``
    in each layer, and ``advance`` at its end.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        batch_size: int,
        num_kv_heads: int,
        max_length: int,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        if batch_size < 1 or max_length < 1:
            raise UltrathinkError(
                f"a cache needs batch_size and max_length of at least 1, not {batch_size} and "
                f"{max_length}."
            )
        shape = (batch_size, num_kv_heads, max_length, head_dim)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(num_layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(num_layers)]
        self.batch_size = batch_size
        self.max_length = max_length
        self.length = 0
        self._layers: tuple[int, ...] | None = None

    def begin(self, batch_size: int, num_tokens: int, layers: tuple[int, ...]) -> None:
        """Check that ``num_tokens`` more fit and that the same layers run as before.

        Raises CacheFullError where they do not fit, UltrathinkError for another batch or path.
        """
        if batch_size != self.batch_size:
            raise UltrathinkError(
                f"the cache holds {self.batch_size} sequences, the input has {batch_size}; make "
                f"another with new_cache(batch_size={batch_size}, ...)."
            )
        if self.length + num_tokens > self.max_length:
            raise CacheFullError(
                f"the cache is full: it holds {self.length} of {self.max_length} positions and "
                f"{num_tokens} more were given; make it longer with new_cache(max_length="
                f"{self.length + num_tokens}) or more."
            )
        if self._layers is not None and self._layers != layers:
            raise UltrathinkError(
                f"the cache was filled by layers {list(self._layers)} and cannot serve layers "
                f"{list(layers)}; keep one ComputePath for one cache, or call reset()."
            )
        self._layers = layers

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store ``[B, K, T, D]`` after what is there; return all ``[B, K, length + T, D]``."""
        stop = self.length + key.shape[2]
        self.keys[layer][:, :, self.length : stop] = key
        self.values[layer][:, :, self.length : stop] = value
        return self.keys[layer][:, :, :stop], self.values[layer][:, :, :stop]

    def advance(self, num_tokens: int) -> None:
        """Count ``num_tokens`` as read, once every layer has stored them."""
        self.length += num_tokens

    def reset(self) -> None:
        """Forget everything read; the memory is kept."""
        self.length = 0
        self._layers = None
