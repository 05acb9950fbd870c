"""Held-out text as windows whose loss gives bits per byte.

Shapes: B windows, T tokens in each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from ultrathink.core.errors import DataError
from ultrathink.data.batch import IGNORED, Batch
from ultrathink.data.cache import TokenStore
from ultrathink.data.packing import Integers, read_windows


class Extent(NamedTuple):
    """The amount of text that is scored."""

    num_tokens: int  # targets
    num_bytes: int  # UTF-8, nothing for end-of-text tokens


class ValidationSet:
    """The held-out documents of each store, joined by end-of-text tokens, in windows of T.

    Windows do not overlap, and documents within one see each other. Each token but a store's first
    is predicted exactly once. Then

        bits per byte = mean nats per token * num_tokens / num_bytes / ln 2

    where the bytes are those of the tokens predicted, and of the first token.
    """

    def __init__(self, stores: Sequence[TokenStore], seq_len: int) -> None:
        """DataError where a store holds nothing to predict."""
        self.stores = list(stores)
        self.seq_len = seq_len
        # Joined, not ended, by end-of-text tokens: the last one is not part of the stream.
        self._num_targets = [store.num_tokens - 2 for store in self.stores]
        for store, num_targets in zip(self.stores, self._num_targets, strict=True):
            if num_targets < 1:
                raise DataError(
                    f"the validation text of source {store.name!r} has {store.num_documents} "
                    f"documents and {store.num_bytes} bytes, too little to score. Name more in "
                    f"data.val, or raise the source's val_fraction."
                )

    def extent(self, max_tokens: int | None = None) -> Extent:
        """The text that ``batches(…, max_tokens)`` scores."""
        num_tokens = num_bytes = 0
        for number, store in enumerate(self.stores):
            chosen = self._windows(number, max_tokens)
            starts = chosen * self.seq_len
            num_tokens += int(self._lengths(number, starts).sum())
            is_whole = len(chosen) == self._num_windows(number)
            num_bytes += store.num_bytes if is_whole else self._count_bytes(number, starts)
        return Extent(num_tokens, num_bytes)

    def batches(self, batch_size: int, max_tokens: int | None = None) -> Iterator[Batch]:
        """The windows in order, ``batch_size`` at a time, the last batch smaller.

        ``max_tokens`` limits them to windows spread evenly over each store, of about that many
        targets in all, at least one window a store.
        """
        for number in range(len(self.stores)):
            chosen = self._windows(number, max_tokens)
            for begin in range(0, len(chosen), batch_size):
                yield self._batch(number, chosen[begin : begin + batch_size])

    def _batch(self, number: int, windows: Integers) -> Batch:
        store = self.stores[number]
        starts = windows * self.seq_len
        tokens = read_windows(store.tokens, starts, self.seq_len)
        values = np.zeros((5, len(windows), self.seq_len), dtype=np.int64)
        values[0] = tokens[:, :-1]
        values[1] = tokens[:, 1:]
        values[2] = np.arange(self.seq_len)
        values[4] = number
        beyond = np.arange(self.seq_len) >= self._lengths(number, starts)[:, None]
        values[0][beyond] = store.eot_id
        values[1][beyond] = IGNORED
        return Batch.unstack(torch.from_numpy(values), torch.from_numpy(windows))

    def _num_windows(self, number: int) -> int:
        return -(-self._num_targets[number] // self.seq_len)

    def _windows(self, number: int, max_tokens: int | None) -> Integers:
        """Numbers of the windows that are used, evenly spread where they are not all."""
        total = self._num_windows(number)
        if max_tokens is None:
            return np.arange(total)
        share = max_tokens * self._num_targets[number] / sum(self._num_targets)
        wanted = min(total, max(1, int(share / self.seq_len)))
        return np.arange(wanted) * total // wanted

    def _lengths(self, number: int, starts: Integers) -> Integers:
        return np.minimum(self._num_targets[number] - starts, self.seq_len)

    def _count_bytes(self, number: int, starts: Integers) -> int:
        store = self.stores[number]
        total = 0
        for start, length in zip(starts, self._lengths(number, starts), strict=True):
            # Nothing predicts the first token; its bytes count with the first window.
            first = start if start == 0 else start + 1
            total += int(store.token_bytes[store.tokens[first : start + length + 1]].sum())
        return total
