"""The KV cache: keys and values of the tokens read so far, so that decoding computes only new ones.

Shapes: B sequences, K key/value heads, S positions that fit, T tokens of a row of the input, of
which the first ones are real and the rest is padding, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ultrathink.config.model import ModelConfig
from ultrathink.core.errors import UltrathinkError
from ultrathink.model.attention_mask import AttentionMask, causal_mask
from ultrathink.model.compute_path import ComputePath


class CacheFullError(UltrathinkError):
    """More tokens than the cache has room for."""


class CacheView(Protocol):
    """A model's interface to a cache, independent of its storage.

    A forward pass calls ``begin`` once, ``update`` and ``visible`` in each layer, and ``commit`` at
    the end. A pass that fails before ``commit`` changes nothing. Lengths differ between sequences
    and between layers: a layer that did not run holds nothing. Visibility is asked for each layer,
    because one may hold fewer tokens than another.
    """

    batch_size: int

    def lengths(self, layer: int) -> tuple[int, ...]:
        """The tokens of each sequence that ``layer`` holds."""

    def begin(self, path: ComputePath, lengths: Sequence[int], num_tokens: int) -> tuple[int, ...]:
        """Make room for the first ``lengths[b]`` of ``num_tokens`` tokens of each row ``b``.

        Returns the position of each row's first new token. Raises CacheFullError if they do not
        fit, UltrathinkError for another number of rows or another path than before.
        """

    def update(
        self, layer: int, key: Tensor, value: Tensor, present: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Append ``[B, K, T, D]``; returns all keys and values of ``layer``.

        They may have empty places, which ``visible`` excludes: also those of tokens that are not
        ``present`` (boolean ``[B, T]``), which pass the layer by.
        """

    def visible(self, layer: int) -> AttentionMask | None:
        """What each new token may see of that; None if causality with T = S, or a single query that
        sees everything, is sufficient."""

    def commit(self) -> None:
        """Count the tokens of this pass as read, after every layer has stored them."""

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget what each sequence holds beyond its first ``lengths[b]`` tokens, in all layers.

        Raises UltrathinkError for a length that a sequence does not have.
        """


class _Pass(NamedTuple):
    """A forward pass from ``begin`` to ``commit``."""

    layers: tuple[int, ...]
    after: tuple[int, ...]
    """The length of each sequence after the pass."""
    stop: int
    """The length of the longest."""
    places: tuple[Tensor, Tensor, Tensor] | None
    """Row, token and position of all real tokens; None where each row fills up to ``stop``."""
    mask: AttentionMask | None
    num_tokens: int


class ContiguousCache:
    """A ``CacheView`` on preallocated keys and values, one pair ``[B, K, S, D]`` for each layer.

    The token at position p of a sequence is at index p. If all rows have equal length, the cache is
    one slice of the tensors, and attention needs only the causal mask.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        assert config.num_kv_heads is not None, "the configuration is resolved first"
        assert config.head_dim is not None, "the configuration is resolved first"
        if batch_size < 1 or max_length < 1:
            raise UltrathinkError(
                f"a cache needs batch_size and max_length of at least 1, not {batch_size} and "
                f"{max_length}."
            )
        shape = (batch_size, config.num_kv_heads, max_length, config.head_dim)
        layers = range(config.num_layers)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.present: dict[int, Tensor] = {}  # [B, S], of layers that tokens pass by
        self.batch_size = batch_size
        self.max_length = max_length
        self._lengths = [(0,) * batch_size for _ in layers]
        self._layers: tuple[int, ...] = ()  # of the path that filled it
        self._pass: _Pass | None = None

    def lengths(self, layer: int) -> tuple[int, ...]:
        return self._lengths[layer]

    def begin(self, path: ComputePath, lengths: Sequence[int], num_tokens: int) -> tuple[int, ...]:
        layers = path.indices(len(self._lengths))
        before = self._lengths[layers[0]]
        self._check_sequences(len(lengths))
        if self._layers != layers and any(map(any, self._lengths)):
            raise UltrathinkError(
                f"the cache was filled by layers {list(self._layers)} and cannot serve layers "
                f"{list(layers)}; keep one ComputePath for one cache, or call reset()."
            )
        after = tuple(map(sum, zip(before, lengths, strict=True)))
        stop = max(after)
        if stop > self.max_length:
            row = after.index(stop)
            raise CacheFullError(
                f"the cache is full: it holds {before[row]} of {self.max_length} positions and "
                f"{lengths[row]} more were given; make it longer with new_cache(max_length="
                f"{stop}) or more."
            )
        device = self.keys[0].device
        places, mask = None, None
        if min(before) == max(before) == stop - num_tokens:
            if num_tokens not in (1, stop):
                mask = AttentionMask(dense=causal_mask(before[:1], num_tokens, stop, device))
        else:
            mask = AttentionMask(dense=causal_mask(before, num_tokens, stop, device))
            places = _places(before, lengths, device)
        self._pass = _Pass(layers, after, stop, places, mask, num_tokens)
        return before

    def update(
        self, layer: int, key: Tensor, value: Tensor, present: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        now = self._running(layer)
        if present is not None:
            self._note_present(layer, now, present)
        keys, values = self.keys[layer][:, :, : now.stop], self.values[layer][:, :, : now.stop]
        if now.places is None:
            start = now.stop - key.shape[2]
            keys[:, :, start:], values[:, :, start:] = key, value
        else:
            rows, tokens, positions = now.places
            keys[rows, :, positions] = key[rows, :, tokens]
            values[rows, :, positions] = value[rows, :, tokens]
        return keys, values

    def visible(self, layer: int) -> AttentionMask | None:
        now = self._running(layer)
        if layer not in self.present:
            return now.mask  # one for all layers of the path: they advance together
        seen = self.present[layer][:, None, None, : now.stop]
        if now.mask is not None and now.mask.dense is not None:
            seen = seen & now.mask.dense
        elif now.num_tokens > 1:
            seen = seen & causal_mask((0,), now.stop, now.stop, seen.device)
        # A token that passes by may see nothing; then it sees all, and is not used.
        return AttentionMask(dense=seen | ~seen.any(-1, keepdim=True))

    def commit(self) -> None:
        assert self._pass is not None, "begin opens a pass"
        self._layers = self._pass.layers
        for layer in self._layers:
            self._lengths[layer] = self._pass.after
        self._pass = None

    def truncate(self, lengths: Sequence[int]) -> None:
        self._check_sequences(len(lengths))
        held = tuple(map(max, zip(*self._lengths, strict=True)))
        for row, (length, most) in enumerate(zip(lengths, held, strict=True)):
            if not 0 <= length <= most:
                raise UltrathinkError(
                    f"sequence {row} of the cache has {most} tokens and cannot be truncated to "
                    f"{length}; use 0 to {most}."
                )
        self._lengths = [tuple(map(min, lengths, layer)) for layer in self._lengths]

    def select(self, rows: Sequence[int]) -> None:
        """Keep these sequences, in this order; a row listed twice is copied."""
        if not rows or not all(0 <= row < self.batch_size for row in rows):
            raise UltrathinkError(
                f"the cache has the sequences 0 to {self.batch_size - 1} and cannot keep "
                f"{list(rows)}."
            )
        index = torch.tensor(rows, device=self.keys[0].device)
        for tensors in (self.keys, self.values):
            for layer, tensor in enumerate(tensors):
                tensors[layer] = tensor[index]
        self.present = {layer: present[index] for layer, present in self.present.items()}
        self._lengths = [tuple(lengths[row] for row in rows) for lengths in self._lengths]
        self.batch_size = len(rows)

    def reset(self) -> None:
        """Forget everything read; the memory is kept."""
        self.truncate((0,) * self.batch_size)

    def _note_present(self, layer: int, now: _Pass, present: Tensor) -> None:
        if layer not in self.present:
            shape = (self.batch_size, self.max_length)
            with torch.inference_mode(False):  # or later passes outside could not store theirs
                self.present[layer] = torch.zeros(shape, device=present.device, dtype=torch.bool)
        if now.places is None:
            self.present[layer][:, now.stop - present.shape[1] : now.stop] = present
        else:
            rows, tokens, positions = now.places
            self.present[layer][rows, positions] = present[rows, tokens]

    def _running(self, layer: int) -> _Pass:
        assert self._pass is not None, "begin opens a pass"
        assert layer in self._pass.layers, "only layers of the path store keys"
        return self._pass

    def _check_sequences(self, given: int) -> None:
        if given != self.batch_size:
            raise UltrathinkError(
                f"the cache holds {self.batch_size} sequences, the input has {given}; make "
                f"another with new_cache(batch_size={given}, ...)."
            )


def _places(
    before: Sequence[int], lengths: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Row, token and position of all real tokens of a pass, int64 each."""
    found = [
        (row, token, start + token)
        for row, (start, length) in enumerate(zip(before, lengths, strict=True))
        for token in range(length)
    ]
    rows, tokens, positions = torch.tensor(found, dtype=torch.int64).T.to(device)
    return rows, tokens, positions
