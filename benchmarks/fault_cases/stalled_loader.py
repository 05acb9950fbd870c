"""Batches that come late."""

from __future__ import annotations

import time

from fault_injection import Fault, Moment

from ultrathink.data.batch import Batch

DELAY_S = 0.15  # several steps' time


class StalledLoader(Fault):
    """For sixty steps each batch takes much longer to come than a step takes."""

    name = "stalled_loader"
    group = "resources"
    num_steps = 60

    def on_batch(self, batch: Batch, moment: Moment) -> Batch:
        time.sleep(DELAY_S)
        return batch


FAULT = StalledLoader
