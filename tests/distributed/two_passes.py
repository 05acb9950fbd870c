"""Tasks of processes that train by two passes over each micro-batch."""

from dataclasses import replace
from typing import Literal

from tests.distributed.tasks import train
from ultrathink.config.objective import OBJECTIVES, ObjectiveConfig
from ultrathink.data.batch import Batch
from ultrathink.training.objectives.base import LOSS, Losses
from ultrathink.training.objectives.pretrain import Pretraining


class TwiceConfig(ObjectiveConfig):
    """Options of ``Twice``."""

    type: Literal["twice"] = "twice"


class Twice(Pretraining):
    """Two passes over each micro-batch, forwards and backwards in time, for one backward pass."""

    def losses(self, batch: Batch) -> Losses:
        first = super().losses(batch)
        mirrored = replace(batch, input_ids=batch.input_ids.flip(1), labels=batch.labels.flip(1))
        second = super().losses(mirrored).terms[LOSS]
        return Losses({**first.terms, "mirrored": second}, first.stats)


def train_twice(place: str, *overrides: str) -> str:
    """``train`` with an objective of two passes, which is registered for as long as it takes."""
    OBJECTIVES.add("twice", Twice, options=TwiceConfig)
    try:
        return train(place, "training.objective=twice", *overrides)
    finally:
        del OBJECTIVES._entries["twice"]
