"""Running out of memory for real: a limit on the address space of the process (Linux)."""

from __future__ import annotations

import resource
from pathlib import Path

import torch
from fault_injection import Fault

MIB = 1 << 20
PER_SEQUENCE_MIB = 64  # what the fault makes each sequence of a micro-batch need
HEADROOM_MIB = 320  # what there is: for half of eight sequences, and not for all


class OutOfMemoryFault(Fault):
    """From its first step on a pass over a micro-batch needs more memory than there is.

    The process may take ``HEADROOM_MIB`` beyond what it has then, and each sequence of a
    micro-batch needs ``PER_SEQUENCE_MIB`` for the time of an allocation: smaller micro-batches fit.
    """

    group = "resources"
    num_steps = None

    def __init__(self) -> None:
        self._before: tuple[int, int] | None = None

    def limit(self) -> None:
        """Let the process have no more than the headroom, from the first call on."""
        if self._before is None:
            self._before = resource.getrlimit(resource.RLIMIT_AS)
            allowed = address_space() + HEADROOM_MIB * MIB
            resource.setrlimit(resource.RLIMIT_AS, (allowed, self._before[1]))

    def end(self) -> None:
        if self._before is not None:
            resource.setrlimit(resource.RLIMIT_AS, self._before)
            self._before = None


def need(num_sequences: int) -> None:
    """Allocate what that many sequences need, and give it back; RuntimeError where it is not there.

    It is torch's own allocation that fails.
    """
    torch.empty(num_sequences * PER_SEQUENCE_MIB * MIB, dtype=torch.uint8)


def address_space() -> int:
    """Bytes of address space that this process has taken."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * 4096
