"""Running out of memory: how it is recognized, the retries, and the messages.

A forward or backward pass that runs out of memory is repeated in smaller micro-batches, which
changes only the rounding. If one of several processes runs out of memory, the others wait in
collectives, so all processes restart from the last checkpoint, in smaller micro-batches.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from ultrathink.core.divisors import largest_divisor
from ultrathink.core.errors import OutOfMemoryError
from ultrathink.training.hardware import return_freed_memory

T = TypeVar("T")

# Messages of plain RuntimeErrors: torch's CPU allocator (on Linux, and elsewhere) and Apple GPU
# allocator, the C++ library, and CUDA calls outside torch's allocator.
_MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "MPS backend out of memory",
    "std::bad_alloc",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
_TRIED = re.compile(r"tried to allocate ([\d.]+) (bytes|[KMG]iB)", re.IGNORECASE)
_MIB = 1 << 20


class SmallerStartError(OutOfMemoryError):
    """This process cannot continue; all can restart, from the last checkpoint, in smaller
    micro-batches."""


@dataclass(frozen=True)
class Fit:
    """The micro-batch size that fits into memory, and why larger ones failed."""

    size: int
    problem: str = ""  # empty if the first attempt succeeded


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` reports a lack of memory, of the host or an accelerator."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)


def problem_of(error: BaseException) -> str:
    """What could not be allocated, in a few words."""
    found = _TRIED.search(str(error))
    if found is None:
        first = str(error).strip().partition("\n")[0]
        return first or type(error).__name__
    amount, unit = found.groups()
    if unit == "bytes":
        amount, unit = f"{float(amount) / _MIB:,.4g}", "MiB"
    return f"{amount} {unit} could not be allocated"


@contextmanager
def out_of_memory_as(message: str) -> Iterator[None]:
    """Turn a lack of memory inside into OutOfMemoryError with ``message`` and the reason."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(f"{message} ({problem_of(error)}).") from error


def smaller_until_it_fits(
    attempt: Callable[[int], T],
    size: int,
    smaller: Callable[[int, str], int],
    undo: Callable[[], None] = lambda: None,
) -> tuple[T, Fit]:
    """The result of ``attempt(size)``, repeated with ``smaller(size, problem)`` until it fits.

    ``undo`` cleans up after a failed attempt; ``smaller`` raises if there is no smaller size.
    """
    problem = ""
    while True:
        try:
            return attempt(size), Fit(size, problem)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            problem = problem_of(error)
        # After the except clause, in which the traceback holds all tensors of the attempt.
        undo()
        gc.collect()
        return_freed_memory()
        size = smaller(size, problem)


def half_of(share: int, size: int) -> int:
    """The size to try after ``size``: the largest divisor of ``share`` up to half of it."""
    return largest_divisor(share, min(size, share) // 2)


def nothing_smaller(num_tokens: int, problem: str, checkpointing: str) -> OutOfMemoryError:
    """The error if a single sequence of ``num_tokens`` tokens does not fit."""
    advice = "" if checkpointing == "full" else "training.activation_checkpointing=full, or "
    return OutOfMemoryError(
        f"training ran out of memory with micro-batches of a single sequence of {num_tokens} "
        f"tokens, the smallest possible ({problem}). Use {advice}a lower data.seq_len, or "
        f"a smaller model (model.num_layers, model.hidden_size). Checkpoints are unchanged."
    )


def smaller_start(rank: int, size: int, half: int, problem: str) -> SmallerStartError:
    """The error if one of several processes ran out of memory."""
    return SmallerStartError(
        f"process {rank} ran out of memory with micro-batches of {size} ({problem}). All processes "
        f"resume from the last checkpoint with {half}, once the launcher restarts them, or with "
        f"ultrathink launch --resume RUN."
    )


STATE_DOES_NOT_FIT = (
    "there is not enough memory for the optimizer state, so training does not start. Use a smaller "
    "model (model.num_layers, model.hidden_size), an optimizer with a smaller state "
    "(training.optimizer.type=muon: one number per weight instead of two), the host's memory in "
    "addition to the GPU's (parallel.offload=optimizer, with adamw), or several processes that "
    "share it (ultrathink launch --nproc N, parallel.zero_stage=1 or above)"
)
UPDATE_FAILED = (
    "the update ran out of memory and may have changed only some of the weights, so this state is "
    "not saved. Checkpoints are unchanged: free memory, then resume from the last one (ultrathink "
    "train --resume RUN). If a GPU is too small, use parallel.offload=optimizer, or several "
    "processes that share the optimizer state (parallel.zero_stage)"
)
