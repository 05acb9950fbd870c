"""Documents into sequences: which tokens a sample holds, and reading many samples at once.

Shapes: B samples, T tokens in a sequence, N tokens in a store.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ultrathink.config.data import PackingConfig

if TYPE_CHECKING:  # a worker process starts quickly and stays small
    from ultrathink.data.cache import TokenStore

IGNORED = -100  # the label of a position that is not trained
PADDING_DOCUMENT = -1  # the document id of positions that hold no text

Integers: TypeAlias = npt.NDArray[np.int64]
CompactIntegers: TypeAlias = npt.NDArray[np.int32]
SampleRequest: TypeAlias = tuple[Integers, Integers]  # sources and positions


class PackedSamples:
    """Consecutive windows of the joined documents.

    Sample k reads tokens kT to (k + 1)T - 1 and predicts each one's successor, so every token
    but the store's first is a target exactly once. That includes a document's first token,
    predicted from the end-of-text token before it: generation without a prompt starts there.
    """

    def __init__(self, store: TokenStore, seq_len: int) -> None:
        self.num_targets = max(0, len(store.tokens) - 1)
        self.seq_len = seq_len
        self.num_samples = -(-self.num_targets // seq_len)

    def spans(self, positions: Integers) -> tuple[Integers, Integers]:
        """First token of each sample, and how many targets it has (1 to T); each ``[B]``."""
        starts = positions * self.seq_len
        return starts, np.minimum(self.num_targets - starts, self.seq_len)


class DocumentSamples:
    """Each document separately: those longer than T are cut, and none are joined.

    Every token but a document's first is a target exactly once, its end-of-text token too. An
    empty document gives no sample.
    """

    def __init__(self, store: TokenStore, seq_len: int) -> None:
        self._offsets = np.asarray(store.offsets)
        self.seq_len = seq_len
        num_targets = np.diff(self._offsets) - 1
        # The number of samples of the documents up to each one.
        self._ends = np.cumsum(-(-num_targets // seq_len))
        self.num_samples = int(self._ends[-1]) if len(self._ends) else 0

    def spans(self, positions: Integers) -> tuple[Integers, Integers]:
        documents = np.searchsorted(self._ends, positions, side="right")
        before = np.where(documents > 0, self._ends[documents - 1], 0)
        starts = self._offsets[documents] + (positions - before) * self.seq_len
        lengths = self._offsets[documents + 1] - 1 - starts
        return starts, np.minimum(lengths, self.seq_len)


def make_samples(
    store: TokenStore, seq_len: int, packing: PackingConfig
) -> PackedSamples | DocumentSamples:
    """The samples of a store under ``packing``."""
    return PackedSamples(store, seq_len) if packing.enabled else DocumentSamples(store, seq_len)


class SampleReader:
    """Reads samples of several stores as arrays, one gather for each store in a call.

    Pickles small, as its stores do.
    """

    def __init__(self, stores: Sequence[TokenStore], seq_len: int, packing: PackingConfig) -> None:
        self.stores = list(stores)
        self.seq_len = seq_len
        self.samples = [make_samples(store, seq_len, packing) for store in stores]
        self._isolates = packing.enabled and packing.isolate_documents

    def read(self, source_ids: Integers, positions: Integers) -> Integers:
        """Samples ``positions`` of stores ``source_ids``, each ``[B]``.

        Returns ``int64 [5, B, T]``: input_ids, labels, positions, document_ids, source_ids.
        """
        values = np.empty((5, len(positions), self.seq_len), dtype=np.int64)
        values[4] = source_ids[:, None]
        for source in np.unique(source_ids):
            rows = np.flatnonzero(source_ids == source)
            if len(rows) == len(source_ids):
                self._fill(values, int(source), positions)
            else:
                part = np.empty((5, len(rows), self.seq_len), dtype=np.int64)
                self._fill(part, int(source), positions[rows])
                values[:4, rows] = part[:4]
        return values

    def read_compact(self, request: SampleRequest) -> CompactIntegers:
        """The same as ``int32``: half the bytes to send between processes."""
        return self.read(*request).astype(np.int32)

    def _fill(self, values: Integers, source: int, positions: Integers) -> None:
        store = self.stores[source]
        starts, lengths = self.samples[source].spans(positions)
        windows = read_windows(store.tokens, starts, self.seq_len)
        values[0] = windows[:, :-1]
        values[1] = windows[:, 1:]
        values[2] = np.arange(self.seq_len)
        values[3] = 0
        if self._isolates:
            self._number_documents(values, windows[:, : self.seq_len - 1] == store.eot_id)
        if lengths.size and lengths.min() < self.seq_len:
            padding = np.arange(self.seq_len) >= lengths[:, None]
            for field, filler in enumerate((store.eot_id, IGNORED, 0, PADDING_DOCUMENT)):
                values[field][padding] = filler

    def _number_documents(self, values: Integers, ends: npt.NDArray[np.bool_]) -> None:
        """Count documents and restart positions after each end; ``ends`` is ``[B, T - 1]``."""
        rows = np.flatnonzero(ends.any(axis=1))  # most sequences lie within one document
        if not rows.size:
            return
        document_ids = np.zeros((len(rows), self.seq_len), dtype=np.int32)
        np.cumsum(ends[rows], axis=1, out=document_ids[:, 1:])
        steps = np.arange(self.seq_len, dtype=np.int32)
        first = np.zeros_like(document_ids)  # where the document of each position begins
        first[:, 1:] = ends[rows] * steps[1:]
        np.maximum.accumulate(first, axis=1, out=first)
        values[2, rows] = steps - first
        values[3, rows] = document_ids


def read_windows(tokens: npt.NDArray[Any], starts: Integers, seq_len: int) -> npt.NDArray[Any]:
    """``seq_len + 1`` tokens from each of ``starts`` ``[B]``, in the store's own type.

    What lies beyond the last token is undefined; the caller masks it.
    """
    width = seq_len + 1
    last = len(tokens) - width
    if last < 0:
        tokens = np.concatenate([tokens, np.zeros(-last, dtype=tokens.dtype)])
        last = 0
    windows = np.lib.stride_tricks.sliding_window_view(tokens, width)
    gathered: npt.NDArray[Any] = windows[np.minimum(starts, last)]
    for row in np.flatnonzero(starts > last):
        remaining = tokens[starts[row] :]
        gathered[row, : len(remaining)] = remaining
    return gathered
