"""One bit of one weight flips."""

from __future__ import annotations

import torch
from fault_injection import Fault, Moment

TOP_EXPONENT_BIT = 1 << 30  # of float32: what is below 2 becomes at least 2**64 times as large


class BitFlip(Fault):
    """The highest bit of the exponent of a weight below 2 flips: silent damage in memory."""

    name = "bit_flip"
    group = "gradient"

    @torch.no_grad()
    def before_update(self, moment: Moment) -> None:
        matrices = [weight for weight in moment.model.parameters() if weight.ndim == 2]
        weights = matrices[len(matrices) // 2].view(-1)
        chosen = int(torch.randint(weights.numel(), (), generator=moment.generator))
        weights[chosen : chosen + 1].view(torch.int32).bitwise_or_(TOP_EXPONENT_BIT)


FAULT = BitFlip
