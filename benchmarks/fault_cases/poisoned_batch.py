"""One batch of tokens that mean nothing."""

from __future__ import annotations

from dataclasses import replace

import torch
from fault_injection import Fault, Moment

from ultrathink.data.batch import Batch


class PoisonedBatch(Fault):
    """Every token of one batch is drawn at random, as from a file that is no text."""

    name = "poisoned_batch"
    group = "data"
    follows = "data"

    def on_batch(self, batch: Batch, moment: Moment) -> Batch:
        return random_tokens(batch, moment)


def random_tokens(batch: Batch, moment: Moment) -> Batch:
    """``batch`` with random tokens, each position still to tell the next one."""
    rows, length = batch.input_ids.shape
    drawn = torch.randint(moment.vocab_size, (rows, length + 1), generator=moment.generator)
    return replace(batch, input_ids=drawn[:, :-1], labels=drawn[:, 1:].clone())


FAULT = PoisonedBatch
