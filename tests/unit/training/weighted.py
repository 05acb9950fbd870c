"""An objective whose targets have weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from ultrathink.config.objective import OBJECTIVES, ObjectiveConfig
from ultrathink.data.batch import Batch
from ultrathink.training.objectives.pretrain import Pretraining


class WeightedConfig(ObjectiveConfig):
    """Options of ``Weighted``."""

    type: Literal["weighted"] = "weighted"


class Weighted(Pretraining):
    """Pretraining whose targets count by their sample and their place, some not at all."""

    def prepare(self, batch: Batch, step: int) -> Batch:
        return replace(batch, loss_weights=weights_of(batch))


def weights_of(batch: Batch) -> Tensor:
    """``[B, T]``: small numbers, 0 among them, that differ from row to row."""
    places = torch.arange(batch.seq_len) + batch.sample_ids[:, None] * 3
    return (places % 7).float() / 256 * (1 + batch.sample_ids[:, None] % 4)


@contextmanager
def registered() -> Iterator[None]:
    """Let a configuration name this objective for as long as this lasts."""
    OBJECTIVES.add("weighted", Weighted, options=WeightedConfig)
    try:
        yield
    finally:
        del OBJECTIVES._entries["weighted"]
