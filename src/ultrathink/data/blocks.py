"""Blocks of consecutive samples: the requests to data workers, and their answers.

Without torch, so that a worker process starts quickly and stays small.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ultrathink.data.packing import Integers, SampleReader


class BlockRequest(NamedTuple):
    """A request for a block of consecutive samples, already located."""

    generation: int  # state of the order; answers to an older one are dropped
    source_ids: Integers
    positions: Integers


class Block(NamedTuple):
    """The requested samples."""

    generation: int
    values: npt.NDArray[np.int32] | Integers  # [5, samples, T]


class BlockReader:
    """Reads blocks; pickles small, as its stores do."""

    def __init__(self, reader: SampleReader) -> None:
        self._reader = reader

    def read(self, request: BlockRequest) -> Block:
        """The samples of ``request``, ``int64``."""
        values = self._reader.read(request.source_ids, request.positions)
        return Block(request.generation, values)

    def read_compact(self, request: BlockRequest) -> Block:
        """The same as ``int32``: half the bytes to send between processes."""
        block = self.read(request)
        return block._replace(values=block.values.astype(np.int32))
