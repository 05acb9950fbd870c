"""A damaged part of the data that is met again in each epoch."""

from __future__ import annotations

from dataclasses import replace

import torch
from fault_injection import Fault, Moment

from ultrathink.data.batch import Batch

EPOCH = 40  # steps; that of a data set small enough to be met again within the run
LENGTH = 4  # steps that the shard lasts


class CorruptShard(Fault):
    """A few batches in each epoch repeat one random token per sequence, as zeroed blocks do.

    They are the same samples, with the same damage, each time.
    """

    name = "corrupt_shard"
    group = "data"
    num_steps = None
    follows = "data"

    def is_active(self, offset: int) -> bool:
        return offset >= 0 and offset % EPOCH < LENGTH

    def on_batch(self, batch: Batch, moment: Moment) -> Batch:
        generator = torch.Generator().manual_seed(moment.offset % EPOCH)
        rows = batch.input_ids.shape[0]
        token = torch.randint(moment.vocab_size, (rows, 1), generator=generator)
        damaged = token.expand_as(batch.input_ids)
        return replace(batch, input_ids=damaged, labels=damaged.clone())


FAULT = CorruptShard
