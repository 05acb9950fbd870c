"""The sequences of one training step.

Shapes: B sequences, T tokens in each.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from ultrathink.data.packing import IGNORED

# The type of a field's tensor.
INT64, FLOAT32 = {"dtype": torch.int64}, {"dtype": torch.float32}


@dataclass(frozen=True)
class Batch:
    """Sequences of token ids with their targets; each tensor has a row for every sequence.

    Another objective derives a batch with more fields.
    """

    input_ids: Tensor = field(metadata=INT64)
    """``[B, T]``."""
    labels: Tensor = field(metadata=INT64)
    """``[B, T]``: the target of each position, already shifted; -100 is not trained."""
    positions: Tensor = field(metadata=INT64)
    """``[B, T]``, for rotary embeddings; restarts with each document that is isolated."""
    document_ids: Tensor = field(metadata=INT64)
    """``[B, T]``: numbers the documents within a sequence from 0; -1 is padding."""
    source_ids: Tensor = field(metadata=INT64)
    """``[B, T]``: the sequence's source in ``data.train``, from 0."""
    sample_ids: Tensor = field(metadata=INT64)
    """``[B]``: each sequence's index in the run's order of samples."""
    loss_weights: Tensor | None = field(default=None, metadata=FLOAT32)
    """``[B, T]``: weight of each target, 0 or above, where an objective uses weights; on all
    processes or on none."""
    unit_size: int = 1
    """Consecutive sequences that belong together (a pair, a group) and are never separated."""

    def __post_init__(self) -> None:
        for name, value in self.tensors().items():
            wanted = self.__dataclass_fields__[name].metadata["dtype"]
            assert value.dtype == wanted, f"{name} is {value.dtype}, and should be {wanted}"
            assert len(value) == self.num_sequences, f"{name} has a row for each sequence"
        assert self.num_sequences % self.unit_size == 0, "units are whole"

    @classmethod
    def unstack(cls, values: Tensor, sample_ids: Tensor) -> Batch:
        """A batch from its first five fields stacked in order, ``int64 [5, B, T]``, and ``[B]``."""
        input_ids, labels, positions, document_ids, source_ids = values.unbind(0)
        return cls(input_ids, labels, positions, document_ids, source_ids, sample_ids)

    @property
    def num_sequences(self) -> int:
        """B."""
        return self.input_ids.shape[0]

    @property
    def seq_len(self) -> int:
        """T."""
        return self.input_ids.shape[1]

    @property
    def targets(self) -> Tensor:
        """``[B, T]``: the labels, without those whose weight is 0."""
        if self.loss_weights is None:
            return self.labels
        return torch.where(self.loss_weights == 0, IGNORED, self.labels)

    @property
    def num_target_tokens(self) -> int:
        """The number of trained positions; means are taken over them."""
        return int((self.targets != IGNORED).sum())

    @property
    def target_weight(self) -> float:
        """The sum of the weights of all targets, in float64."""
        assert self.loss_weights is not None, "targets have weights"
        return float(self.loss_weights[self.targets != IGNORED].double().sum())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by field name, without those that are None."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def on(self, device: torch.device | str, *names: str) -> list[Tensor]:
        """Some fields, on ``device``."""
        return [getattr(self, name).to(device, non_blocking=True) for name in names]

    def share(self, rank: int, size: int) -> Self:
        """The ``rank``-th of ``size`` parts of equal size, units whole.

        Where there are too few sequences, a part is padded with sequences that are not trained.
        """
        if size == 1:
            return self
        num_units = -(-self.num_sequences // self.unit_size // size)
        num_rows = num_units * self.unit_size
        rows = torch.arange(rank * num_rows, (rank + 1) * num_rows)
        chosen = rows.clamp(max=self.num_sequences - 1)
        part: dict[str, Any] = {name: value[chosen] for name, value in self.tensors().items()}
        part["labels"][rows >= self.num_sequences] = IGNORED
        return replace(self, **part)

    def split(self, micro_batch_size: int) -> list[Self]:
        """Consecutive micro-batches of ``micro_batch_size`` sequences; the last may have fewer.

        Each has whole units, at least one.
        """
        num_rows = max(1, micro_batch_size // self.unit_size) * self.unit_size
        if num_rows >= self.num_sequences:
            return [self]
        parts: dict[str, Any] = {
            name: value.split(num_rows) for name, value in self.tensors().items()
        }
        return [
            replace(self, **dict(zip(parts, part, strict=True)))
            for part in zip(*parts.values(), strict=True)
        ]
