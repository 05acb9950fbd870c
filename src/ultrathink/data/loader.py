"""Training batches in an order that survives any number of workers, ranks or restarts."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ultrathink.config.data import PackingConfig
from ultrathink.core.errors import CheckpointError, DataError
from ultrathink.core.protocols import State
from ultrathink.data.batch import Batch
from ultrathink.data.cache import TokenStore
from ultrathink.data.order import Change, SampleOrder
from ultrathink.data.packing import Integers, SampleReader

# Samples are read in blocks of about so many tokens: small batches share the cost of a read.
_BLOCK_TOKENS = 65_536
_PREFETCHED_BLOCKS = 2  # for each worker


class _Request(NamedTuple):
    """A block of consecutive samples, already located: what a worker is sent."""

    generation: int  # which state of the order asked; answers to an older one are dropped
    source_ids: Integers
    positions: Integers


class _Block(NamedTuple):
    generation: int
    values: npt.NDArray[np.int32] | Integers  # [5, samples, T]


class TrainLoader:
    """Whole global batches of a mixture of stores, without end.

    Sample n depends on ``seed``, n, and the changes made with ``skip`` and ``set_weights``, and
    on nothing else. ``num_samples`` is the number of samples in all sources together: an epoch.
    With one source an epoch brings each sample once; in a mixture each source runs through its
    own epochs, at the pace of its weight, and none ends before the others.
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
    ) -> None:
        if batch_size < 1:
            raise DataError(f"training.batch_size is {batch_size}; it must be at least 1.")
        self._batch_size = batch_size
        self.seq_len = seq_len
        self.num_workers = num_workers
        self._packing = packing
        self._reader = SampleReader(stores, seq_len, packing)
        self._sizes = [samples.num_samples for samples in self._reader.samples]
        self._order = SampleOrder(self._sizes, weights, seed)
        self._samples_seen = 0
        self._generation = 0
        self._next_requested = 0
        self._blocks: Iterator[_Block] | None = None
        self._block: Tensor | None = None  # read but not yet handed out
        self._block_samples = batch_size * max(1, _BLOCK_TOKENS // (batch_size * seq_len))

    @property
    def batch_size(self) -> int:
        """Samples in a batch, over all devices."""
        return self._batch_size

    @property
    def num_samples(self) -> int:
        """Samples in an epoch: those of all sources together."""
        return sum(self._sizes)

    @property
    def samples_seen(self) -> int:
        """Samples handed out so far; those jumped over are not counted."""
        return self._samples_seen

    @property
    def samples_skipped(self) -> int:
        """Samples jumped over so far."""
        return sum(change.skip for change in self._order.changes)

    @property
    def weights(self) -> tuple[float, ...]:
        """The weights that apply now, as they were given."""
        given = [change.weights for change in self._order.changes if change.weights is not None]
        return given[-1] if given else self._order.weights

    def next_batch(self) -> Batch:
        """The next ``batch_size`` samples."""
        if self._block is None:
            self._block = self._next_block()
        values = self._block[:, : self.batch_size]
        rest = self._block[:, self.batch_size :]
        self._block = rest if rest.shape[1] else None
        self._samples_seen += self.batch_size
        return Batch.unstack(values)

    def skip(self, num_samples: int) -> None:
        """Jump over the next ``num_samples`` samples."""
        if num_samples < 0:
            raise DataError(f"cannot skip {num_samples} samples; the number must not be negative.")
        self._change(Change(self._samples_seen, skip=num_samples))

    def set_weights(self, weights: Sequence[float]) -> None:
        """Mix the sources by ``weights`` from the next sample on; each goes on where it stands."""
        self._change(Change(self._samples_seen, weights=tuple(map(float, weights))))

    def state_dict(self) -> State:
        """All that decides the next sample, as plain values."""
        return {**self._identity(), **self._cursor()}

    def load_state_dict(self, state: State) -> None:
        """Go on where ``state`` was taken; CheckpointError names what of the data differs."""
        values: dict[str, Any] = dict(state)
        for key, here in self._identity().items():
            if values.get(key) != here:
                raise CheckpointError(
                    f"the checkpoint's data order was made with {_MEANINGS[key]} "
                    f"{values.get(key)!r}, here it is {here!r}; the samples would not be the "
                    f"same. Resume with the configuration and the data of the run."
                )
        changes = [Change.from_plain(plain) for plain in values["changes"]]
        self._order = SampleOrder(self._sizes, self._order.weights, self._order.seed, changes)
        self._samples_seen = int(values["samples_seen"])
        self._discard()

    def close(self) -> None:
        """Stop the worker processes; a later ``next_batch`` starts them again."""
        self._discard()
        self._blocks = None  # the last reference: torch joins the workers

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self._order.seed,
            "seq_len": self.seq_len,
            "packing": self._packing.model_dump(mode="json"),
            "sizes": list(self._sizes),
            "weights": list(self._order.weights),
        }

    def _cursor(self) -> dict[str, Any]:
        return {
            "samples_seen": self._samples_seen,
            "changes": [change.to_plain() for change in self._order.changes],
        }

    def _change(self, change: Change) -> None:
        self._order.append(change)
        self._discard()

    def _discard(self) -> None:
        """Forget what was read ahead: the next block is asked for at the cursor."""
        self._block = None
        self._generation += 1
        self._next_requested = self._samples_seen

    def _next_block(self) -> Tensor:
        if self._blocks is None:
            self._next_requested = self._samples_seen
            self._blocks = self._start()
        while True:
            block = next(self._blocks)
            if block.generation == self._generation:
                return torch.from_numpy(block.values).to(torch.int64)

    def _start(self) -> Iterator[_Block]:
        dataset = _BlockDataset(self._reader)
        if self.num_workers == 0:
            return (dataset[request] for request in self._requests())
        blocks: DataLoader[_Block] = DataLoader(
            dataset,
            sampler=self._requests(),
            batch_size=None,
            num_workers=self.num_workers,
            prefetch_factor=_PREFETCHED_BLOCKS,
            collate_fn=_compact,
            worker_init_fn=_ignore_interrupt,
            # A fork would copy the locks of tokenizer and torch threads in whatever state.
            multiprocessing_context="spawn",
            # Otherwise each start would draw from the global generator that the model uses.
            generator=torch.Generator(),
        )
        return iter(blocks)

    def _requests(self) -> Iterator[_Request]:
        """Blocks in order, for ever; a change moves ``_next_requested`` back."""
        while True:
            begin = self._next_requested
            self._next_requested = begin + self._block_samples
            located = self._order.locate(np.arange(begin, self._next_requested))
            yield _Request(self._generation, located.source_ids, located.positions)


_MEANINGS = {
    "seed": "run.seed",
    "seq_len": "data.seq_len",
    "packing": "data.packing",
    "sizes": "these numbers of samples in the sources of data.train:",
    "weights": "these weights of the sources of data.train:",
}


class _BlockDataset(Dataset[_Block]):
    """Answers requests; what a worker process holds."""

    def __init__(self, reader: SampleReader) -> None:
        self._reader = reader

    def __getitem__(self, request: _Request) -> _Block:
        return _Block(request.generation, self._reader.read(request.source_ids, request.positions))


def _compact(block: Any) -> Any:
    """The block as a worker sends it: half the bytes, and an array instead of a tensor.

    A tensor would go through shared memory, by C++ code that runs in a thread of the worker and
    aborts the process when it is told to stop in the middle of it.
    """
    return block._replace(values=block.values.astype(np.int32))


def _ignore_interrupt(worker: int) -> None:
    """Leave Ctrl-C to the trainer, which saves before it stops its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
