"""Training batches in an order that is the same for any number of workers, ranks and restarts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ultrathink.config.data import PackingConfig
from ultrathink.core.errors import CheckpointError, DataError
from ultrathink.core.protocols import State
from ultrathink.data.batch import Batch
from ultrathink.data.cache import TokenStore, without_read_ahead
from ultrathink.data.order import Change, SampleOrder
from ultrathink.data.packing import CompactIntegers, Integers, SampleReader, SampleRequest
from ultrathink.data.workers import WorkerPool

# Samples are read in blocks of about this many tokens, so that small batches share the cost.
_BLOCK_TOKENS = 65_536
_PREFETCHED_BLOCKS = 2  # for each worker

# What ``order_hash`` looks at: the first samples, some of later epochs and large indices, and the
# content of a few. Changing these changes the hash of every run.
_PROBED_INDICES = np.concatenate([np.arange(256), 10**6 + np.arange(64), 2**45 + np.arange(16)])
_PROBED_CHANGES = (100, 150)  # where the probe skips samples, and mixes by other weights
_PROBED_CONTENTS = (0, 1, 2, 3, 17, 100, 255)


class Share(NamedTuple):
    """The part of each batch that a process takes: the ``rank``-th of ``size`` equal parts."""

    rank: int = 0
    size: int = 1

    def rows(self, batch_size: int) -> range:
        """Its rows of a batch; DataError where the parts cannot be equal."""
        if batch_size % self.size:
            raise DataError(
                f"training.batch_size = {batch_size} cannot be divided by {self.size} processes."
            )
        num_rows = batch_size // self.size
        return range(self.rank * num_rows, (self.rank + 1) * num_rows)


WHOLE = Share()


class TrainLoader:
    """Endless batches of a mixture of stores: whole ones, or this process's share of each.

    Sample n depends only on ``seed``, n, and the changes made with ``skip`` and ``set_weights``.
    ``num_samples`` counts the samples of all sources: an epoch. With one source an epoch has each
    sample once; in a mixture each source has its own epochs, at the pace of its weight, and none
    ends before the others.
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        weights: Sequence[float],
        *,
        seq_len: int,
        batch_size: int,
        packing: PackingConfig,
        seed: int,
        num_workers: int = 0,
        share: Share = WHOLE,
    ) -> None:
        if batch_size < 1:
            raise DataError(f"training.batch_size is {batch_size}; it must be at least 1.")
        self._rows = share.rows(batch_size)
        self.batch_size = batch_size  # over all devices
        self.seq_len = seq_len
        self.num_workers = num_workers
        self._packing = packing
        self._reader = SampleReader(stores, seq_len, packing)
        self._sizes = [samples.num_samples for samples in self._reader.samples]
        self._order = SampleOrder(self._sizes, weights, seed)
        self._configured = self._order.weights  # the last argument of ``mix_by``
        self.seed = self._order.seed
        self.num_samples = sum(self._sizes)
        self.samples_seen = 0  # handed out to all processes, without the skipped ones
        self._next_requested = 0
        self._num_outdated = 0  # pending answers to requests from before a change of the order
        self._pool: WorkerPool[SampleRequest, CompactIntegers] | None = None
        self._notes: list[str] = []
        self._block: Tensor | None = None  # read but not yet handed out
        batches = max(1, _BLOCK_TOKENS // (len(self._rows) * seq_len))
        self._block_samples = batch_size * batches  # of all processes

    @property
    def samples_skipped(self) -> int:
        """Samples skipped so far."""
        return sum(change.skip for change in self._order.changes)

    @property
    def weights(self) -> tuple[float, ...]:
        """The weights in effect, as they were given."""
        given = [change.weights for change in self._order.changes if change.weights is not None]
        return given[-1] if given else self._order.weights

    def next_batch(self) -> Batch:
        """The next ``batch_size`` samples, or this process's share of them."""
        if self._block is None:
            self._block = self._next_block()
        num_rows = len(self._rows)
        values, rest = self._block[:, :num_rows], self._block[:, num_rows:]
        self._block = rest if rest.shape[1] else None
        sample_ids = torch.arange(self._rows.start, self._rows.stop) + self.samples_seen
        self.samples_seen += self.batch_size
        return Batch.unstack(values, sample_ids)

    def skip(self, num_samples: int) -> None:
        """Skip the next ``num_samples`` samples."""
        if num_samples < 0:
            raise DataError(f"cannot skip {num_samples} samples; the number must not be negative.")
        self._change(Change(self.samples_seen, skip=num_samples))

    def set_weights(self, weights: Sequence[float]) -> None:
        """Mix the sources by ``weights`` from the next sample on; each continues where it is."""
        self._change(Change(self.samples_seen, weights=tuple(map(float, weights))))

    def mix_by(self, weights: Sequence[float]) -> None:
        """Mix by the configuration's ``weights`` from the next sample on, if they changed.

        Otherwise the weights of a later ``set_weights`` stay in effect.
        """
        wanted = tuple(map(float, weights))
        if wanted != self._configured:
            self.set_weights(wanted)
            self._configured = wanted

    def order_hash(self) -> str:
        """A SHA-256 of the order of the samples, and of the content of a few.

        It depends on the stores, ``seq_len``, packing, the seed and the code, so that with equal
        data and settings another hash means that the code orders or packs samples differently. It
        does not depend on the weights or the loader's history. Takes milliseconds.
        """
        digest = hashlib.sha256()
        has_samples = [float(size > 0) for size in self._sizes]
        order = SampleOrder(self._sizes, has_samples, self.seed)
        fresh = order.locate(_PROBED_INDICES)
        skip_at, mix_at = _PROBED_CHANGES
        order.append(Change(skip_at, skip=7))
        rising = tuple(number * share for number, share in enumerate(has_samples, start=1))
        order.append(Change(mix_at, weights=rising))
        for field in (*fresh, *order.locate(_PROBED_INDICES)):
            digest.update(field.astype("<i8").tobytes())
        few = list(_PROBED_CONTENTS)
        last = [(number, size - 1) for number, size in enumerate(self._sizes) if size > 0]
        source_ids = np.array([*fresh.source_ids[few], *(number for number, _ in last)])
        positions = np.array([*fresh.positions[few], *(position for _, position in last)])
        with without_read_ahead(store.tokens for store in self._reader.stores):
            values = self._reader.read(source_ids, positions)
        digest.update(values.astype("<i8").tobytes())
        return digest.hexdigest()

    def state_dict(self) -> State:
        """Everything that decides the next sample, as plain values."""
        return {
            **self._identity(),
            "samples_seen": self.samples_seen,
            "weights": list(self._order.weights),
            "configured": list(self._configured),
            "changes": [change.to_plain() for change in self._order.changes],
        }

    def load_state_dict(self, state: State) -> None:
        """Continue from ``state``, with its weights; CheckpointError names what differs."""
        values: dict[str, Any] = dict(state)
        for key, here in self._identity().items():
            if values.get(key) != here:
                raise CheckpointError(
                    f"the checkpoint's data order was made with {_MEANINGS[key]} "
                    f"{values.get(key)!r}, and here it is {here!r}: the samples would differ. "
                    f"Resume with the configuration and the data of the run."
                )
        changes = [Change.from_plain(plain) for plain in values["changes"]]
        self._order = SampleOrder(self._sizes, values["weights"], self.seed, changes)
        self._configured = tuple(values["configured"])
        self.samples_seen = int(values["samples_seen"])
        self._discard()

    def close(self) -> None:
        """Stop the worker processes; a later ``next_batch`` restarts them."""
        pool, self._pool = self._pool, None
        self._discard()
        if pool is not None:
            pool.stop()

    def take_notes(self) -> list[str]:
        """Incidents of the workers since the last call, a line each."""
        notes = list(self._notes)
        self._notes.clear()
        return notes

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "seq_len": self.seq_len,
            "packing": self._packing.model_dump(mode="json"),
            "sizes": list(self._sizes),
        }

    def _change(self, change: Change) -> None:
        self._order.append(change)
        self._discard()

    def _discard(self) -> None:
        """Discard what was read ahead: the next block is requested at the cursor."""
        self._block = None
        self._num_outdated = 0 if self._pool is None else self._pool.num_pending
        self._next_requested = self.samples_seen

    def _next_block(self) -> Tensor:
        try:
            return torch.from_numpy(self._read_block()).to(torch.int64)
        except BaseException:
            self.close()  # pending requests are lost: a retry starts at the cursor
            raise

    def _read_block(self) -> Integers | CompactIntegers:
        if self.num_workers == 0:
            return self._reader.read(*self._next_request())
        if self._pool is None:
            self._pool = WorkerPool(self._reader.read_compact, self.num_workers, self._notes)
        while True:
            while self._pool.num_pending < self.num_workers * _PREFETCHED_BLOCKS:
                self._pool.submit(self._next_request())
            values = self._pool.receive()
            if self._num_outdated == 0:
                return values
            self._num_outdated -= 1

    def _next_request(self) -> SampleRequest:
        """The next block in order; a change moves ``_next_requested`` back."""
        begin = self._next_requested
        self._next_requested = begin + self._block_samples
        batches = np.arange(begin, self._next_requested).reshape(-1, self.batch_size)
        located = self._order.locate(batches[:, self._rows].ravel())
        return located.source_ids, located.positions


_MEANINGS = {
    "seed": "run.seed",
    "seq_len": "data.seq_len",
    "packing": "data.packing",
    "sizes": "these numbers of samples in the sources of data.train:",
}
