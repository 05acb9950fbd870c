"""Copies to the host that are made as late as they may be, in place of those from a GPU."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ultrathink.training.host_states import Copy, Transfer


class LateTransfer:
    def __init__(self, copies: Sequence[Copy]) -> None:
        self.copies = list(copies)

    def hold_back_writes(self) -> None:
        self.wait()

    def wait(self) -> None:
        while self.copies:
            source, target = self.copies.pop()
            target.copy_(source)


class LateCopier:
    """Whatever is written to without waiting for it is found in the copy."""

    def __init__(self) -> None:
        self.num_begun = 0

    def target(self, source: Tensor) -> Tensor | None:
        return torch.empty_like(source)

    def begin(self, copies: Sequence[Copy]) -> Transfer:
        self.num_begun += 1
        return LateTransfer(copies)
