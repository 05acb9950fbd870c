"""Running out of memory: how it is recognized, what is tried, what is told.

A forward or backward pass that fails for want of memory is repeated in smaller micro-batches, which
change nothing but the rounding. Where one process of several fails, collectives are under way that
it cannot leave, so all start again from the last checkpoint, in smaller micro-batches.
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

# What torch says where it raises a plain RuntimeError: its allocator of the CPU (on Linux, and
# elsewhere) and of Apple's GPUs, the C++ library, and CUDA beside torch's own allocator.
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
    """This process cannot go on; all of them can, from the last checkpoint, in smaller pieces."""


@dataclass(frozen=True)
class Fit:
    """The micro-batch that memory sufficed for, and what the larger ones failed for."""

    size: int
    problem: str = ""  # empty where the first attempt succeeded


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory did not suffice: of the host, or of an accelerator."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)


def problem_of(error: BaseException) -> str:
    """What could not be had, in a few words."""
    found = _TRIED.search(str(error))
    if found is None:
        first = str(error).strip().partition("\n")[0]
        return first or type(error).__name__
    amount, unit = found.groups()
    if unit == "bytes":
        amount, unit = f"{float(amount) / _MIB:,.4g}", "MiB"
    return f"{amount} {unit} could not be allocated"


@contextmanager
def told_as(message: str) -> Iterator[None]:
    """Raise OutOfMemoryError where memory does not suffice inside: ``message``, then the reason."""
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
    """``attempt(size)``, again and again with what ``smaller(size, problem)`` answers to a failure.

    ``undo`` puts back what a failed attempt left; ``smaller`` raises where there is nothing to try.
    """
    problem = ""
    while True:
        try:
            return attempt(size), Fit(size, problem)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            problem = problem_of(error)
        # Not in the clause above: there the error's traceback holds all tensors of the attempt.
        undo()
        gc.collect()
        return_freed_memory()
        size = smaller(size, problem)


def half_of(share: int, size: int) -> int:
    """The micro-batch to try after ``size``: the largest divisor of ``share`` up to its half."""
    return largest_divisor(share, min(size, share) // 2)


def nothing_smaller(num_tokens: int, problem: str, checkpointing: str) -> OutOfMemoryError:
    """What to say where a single sequence of ``num_tokens`` tokens does not fit."""
    advice = "" if checkpointing == "full" else "training.activation_checkpointing=full, or "
    return OutOfMemoryError(
        f"training ran out of memory with micro-batches of a single sequence of {num_tokens} "
        f"tokens, which cannot be made smaller ({problem}). Take {advice}a lower data.seq_len, or "
        f"a smaller model (model.num_layers, model.hidden_size). Checkpoints are as they were."
    )


def smaller_start(rank: int, size: int, half: int, problem: str) -> SmallerStartError:
    """What to say where one of several processes failed, which all start again therefore."""
    return SmallerStartError(
        f"process {rank} ran out of memory with micro-batches of {size} ({problem}). From the last "
        f"checkpoint all go on with {half}: once a launcher has started them again, or with "
        f"ultrathink launch --resume RUN."
    )


STATE_DOES_NOT_FIT = (
    "memory does not suffice for what the optimizer remembers of each weight, so training does not "
    "begin. Take a smaller model (model.num_layers, model.hidden_size), an optimizer that keeps "
    "less (training.optimizer.type=muon: one number a weight instead of two), the memory of the "
    "host beside the GPU's (parallel.offload=optimizer, with adamw), or several processes that "
    "divide it (ultrathink launch --nproc N, parallel.zero_stage=1 or above)"
)
UPDATE_FAILED = (
    "the update ran out of memory and may have moved some weights and not others, so this state is "
    "not saved. Checkpoints are as they were: make room, then go on from the last one (ultrathink "
    "train --resume RUN), where a GPU is too small with parallel.offload=optimizer, or on several "
    "processes that divide the optimizer's state (parallel.zero_stage)"
)
