"""What batches hold, for comparison."""

from __future__ import annotations

from torch import Tensor

from ultrathink.data.batch import Batch


def planes(batch: Batch) -> list[Tensor]:
    """The five fields ``[B, T]``, in order."""
    return [
        batch.input_ids,
        batch.labels,
        batch.positions,
        batch.document_ids,
        batch.source_ids,
    ]
