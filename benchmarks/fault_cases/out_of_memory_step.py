"""The optimizer runs out of memory."""

from __future__ import annotations

from fault_injection import Moment
from fault_memory import OutOfMemoryFault, need

SEQUENCES = 8  # a need that no smaller micro-batch makes smaller


class OutOfMemoryInStep(OutOfMemoryFault):
    """The optimizer's step needs more than there is, for any micro-batch."""

    name = "out_of_memory_step"

    def before_update(self, moment: Moment) -> None:
        self.limit()
        need(SEQUENCES)


FAULT = OutOfMemoryInStep
