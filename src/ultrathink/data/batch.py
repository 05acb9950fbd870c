"""What the model is trained on in one step.

Shapes: B sequences, T tokens in each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ultrathink.data.packing import IGNORED


@dataclass(frozen=True)
class Batch:
    """Sequences of token ids with their targets, each ``int64 [B, T]``."""

    input_ids: Tensor
    labels: Tensor
    """The target of each position, already shifted; -100 is not trained."""
    positions: Tensor
    """Position for rotary embeddings; restarts with each document that is isolated."""
    document_ids: Tensor
    """Numbers the documents within a sequence from 0; -1 is padding."""
    source_ids: Tensor
    """Which source of ``data.train`` the sequence came from, in the order of the config."""

    @classmethod
    def unstack(cls, values: Tensor) -> Batch:
        """A batch from its five fields stacked in the order above, ``int64 [5, B, T]``."""
        return cls(*values.unbind(0))

    @property
    def num_sequences(self) -> int:
        """B."""
        return self.input_ids.shape[0]

    @property
    def num_target_tokens(self) -> int:
        """How many positions are trained; means are taken over them."""
        return int((self.labels != IGNORED).sum())

    def fields(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The five tensors in order."""
        return self.input_ids, self.labels, self.positions, self.document_ids, self.source_ids

    def to(self, device: torch.device | str) -> Batch:
        """The batch on ``device``."""
        return Batch(*(field.to(device, non_blocking=True) for field in self.fields()))

    def share(self, rank: int, size: int) -> Batch:
        """The ``rank``-th of ``size`` parts of as many sequences each.

        Where there are too few, a part is filled up with sequences that nothing is trained on.
        """
        if size == 1:
            return self
        num_rows = -(-self.num_sequences // size)
        begin = min(rank * num_rows, self.num_sequences)
        rows = torch.arange(begin, begin + num_rows)
        part = Batch(*(field[rows.clamp(max=self.num_sequences - 1)] for field in self.fields()))
        part.labels[rows >= self.num_sequences] = IGNORED
        return part

    def split(self, micro_batch_size: int) -> list[Batch]:
        """Consecutive pieces of ``micro_batch_size`` sequences; the last may have fewer."""
        pieces = zip(*(field.split(micro_batch_size) for field in self.fields()), strict=True)
        return [Batch(*piece) for piece in pieces]
