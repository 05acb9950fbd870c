"""Twenty steps in which labels stand at the wrong positions."""

from __future__ import annotations

from dataclasses import replace

import torch
from fault_injection import Fault, Moment

from ultrathink.data.batch import Batch


class ShuffledLabels(Fault):
    """The labels of each sequence are put in a random order, as by a bug in a data pipeline."""

    name = "shuffled_labels"
    group = "data"
    num_steps = 20
    follows = "data"

    def on_batch(self, batch: Batch, moment: Moment) -> Batch:
        rows, length = batch.labels.shape
        order = torch.rand(rows, length, generator=moment.generator).argsort(1)
        return replace(batch, labels=batch.labels.gather(1, order))


FAULT = ShuffledLabels
