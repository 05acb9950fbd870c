"""Objectives of text: one whose targets have weights, and one of two passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from ultrathink.config.objective import OBJECTIVES, ObjectiveConfig
from ultrathink.data.batch import Batch
from ultrathink.training.objectives.base import LOSS, Losses
from ultrathink.training.objectives.pretrain import Pretraining


class OwnConfig(ObjectiveConfig):
    """Options of the objectives below."""

    type: Literal["weighted", "twice"] = "weighted"


class Weighted(Pretraining):
    """Pretraining whose targets count by their sample and their place, some not at all."""

    def prepare(self, batch: Batch, step: int) -> Batch:
        return replace(batch, loss_weights=weights_of(batch))


def weights_of(batch: Batch) -> Tensor:
    """``[B, T]``: small numbers, 0 among them, that differ from row to row."""
    places = torch.arange(batch.seq_len) + batch.sample_ids[:, None] * 3
    return (places % 7).float() / 256 * (1 + batch.sample_ids[:, None] % 4)


class Twice(Pretraining):
    """Two passes over each micro-batch, forwards and backwards in time, for one backward pass."""

    def losses(self, batch: Batch) -> Losses:
        first = super().losses(batch)
        mirrored = replace(batch, input_ids=batch.input_ids.flip(1), labels=batch.labels.flip(1))
        second = super().losses(mirrored).terms[LOSS]
        return Losses({**first.terms, "mirrored": second}, first.stats)


@contextmanager
def registered() -> Iterator[None]:
    """Let a configuration name these objectives for as long as this lasts."""
    OBJECTIVES.add("weighted", Weighted, options=OwnConfig)
    OBJECTIVES.add("twice", Twice, options=OwnConfig)
    try:
        yield
    finally:
        del OBJECTIVES._entries["weighted"], OBJECTIVES._entries["twice"]
