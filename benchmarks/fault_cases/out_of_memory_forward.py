"""The forward pass runs out of memory."""

from __future__ import annotations

from fault_injection import Moment
from fault_memory import OutOfMemoryFault, need


class OutOfMemoryInForward(OutOfMemoryFault):
    """The forward pass of a whole batch does not fit any more; that of half of it does."""

    name = "out_of_memory_forward"

    def on_forward(self, num_sequences: int, moment: Moment) -> None:
        self.limit()
        need(num_sequences)


FAULT = OutOfMemoryInForward
