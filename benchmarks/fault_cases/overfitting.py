"""Training continues with a handful of documents."""

from __future__ import annotations

from fault_injection import Fault, Moment

from ultrathink.data.batch import Batch

NUM_BATCHES = 2


class Overfitting(Fault):
    """The loader gives the same two batches again and again, as after a mistake in a data mix."""

    name = "overfitting"
    group = "data"
    num_steps = None
    follows = "time"

    def __init__(self) -> None:
        self._kept: list[Batch] = []

    def on_batch(self, batch: Batch, moment: Moment) -> Batch:
        if len(self._kept) < NUM_BATCHES:
            self._kept.append(batch)
        return self._kept[moment.num_active % NUM_BATCHES]


FAULT = Overfitting
