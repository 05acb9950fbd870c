"""Memory that is taken in each step and never given back."""

from __future__ import annotations

import torch
from fault_injection import Fault, Moment
from torch import Tensor

FLOATS = 1 << 19  # 2 MiB


class MemoryLeak(Fault):
    """Each step keeps 2 MiB, as a list of losses that were not detached does."""

    name = "memory_leak"
    group = "resources"
    num_steps = None

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def before_update(self, moment: Moment) -> None:
        self.kept.append(torch.ones(FLOATS))

    def end(self) -> None:
        self.kept.clear()


FAULT = MemoryLeak
