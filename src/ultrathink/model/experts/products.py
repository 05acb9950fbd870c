"""The product of each expert's rows with its own matrix, for all experts at once.

One operator, ``grouped_product``, with its gradient and a choice of kernels: torch's
``grouped_mm`` for GPUs, batched products for CPUs, and a loop as reference. After
MegaBlocks, https://arxiv.org/abs/2211.15841.

Shapes: R rows, E experts, O outputs, I inputs. The rows of the e-th expert end at ``ends[e]``;
rows beyond the last end belong to none, and what is computed for them is zero.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ultrathink.config.experts import EXPERT_BACKENDS

AUTOMATIC = ("batched", "grouped_mm", "loop")  # those that ``choose_expert_backend`` knows


def choose_expert_backend(device_type: str, dtype: torch.dtype) -> str:
    """The name of the fastest backend that supports this device and precision.

    On a CPU ``batched`` is faster than ``grouped_mm`` (see ``Batched``); on a GPU it would wait
    for the number of each expert's rows.
    """
    if device_type == "cpu":
        return "batched"
    return "grouped_mm" if dtype in GROUPED_MM_DTYPES else "loop"


class ExpertBackend(Protocol):
    """A kernel of the grouped product and of its gradient."""

    by_size: bool
    """Whether experts with equal numbers of rows must be adjacent."""

    def multiple(self, mean_rows: int) -> int:
        """Each expert's rows are padded with zeros to a multiple of this power of 2.

        ``mean_rows`` is the mean number of rows of an expert.
        """

    def product(self, rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        """``rows[R, I]`` times ``weights[E, I, O]`` of their experts: ``[R, O]``."""

    def outer(self, grad: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
        """``grad[R, O]`` transposed times ``rows[R, I]`` for each expert: ``[E, O, I]``."""


GROUPED_MM_DTYPES = (torch.bfloat16, torch.float32)


class GroupedMM:
    """torch's grouped product: fp32 and bf16, no host synchronization."""

    by_size = False

    def multiple(self, mean_rows: int) -> int:
        """Rows of 16 bytes in a transposed product too."""
        return 8

    def product(self, rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        out = F.grouped_mm(rows, weights, offs=ends)
        return torch.where(_is_used(ends, len(rows)), out, 0.0)

    def outer(self, grad: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
        return F.grouped_mm(grad.mT, rows, offs=ends)


class Loop:
    """One product after the other, in any precision: the reference for the others."""

    by_size = False

    def multiple(self, mean_rows: int) -> int:
        return 1

    def product(self, rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        out = rows.new_zeros(len(rows), weights.shape[-1])
        begin = 0
        for weight, end in zip(weights.unbind(0), ends.tolist(), strict=True):
            if end > begin:
                torch.mm(rows[begin:end], weight, out=out[begin:end])
            begin = end
        return out

    def outer(self, grad: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
        out = rows.new_zeros(len(ends), grad.shape[1], rows.shape[1])
        begin = 0
        for total, end in zip(out.unbind(0), ends.tolist(), strict=True):
            if end > begin:
                torch.mm(grad[begin:end].mT, rows[begin:end], out=total)
            begin = end
        return out


class Batched:
    """A batched product for all experts with equal numbers of rows, for CPUs, in any precision.

    Single products are expensive on a CPU: 64 of 64 rows, 256 to 256, bf16, two threads of an AMD
    EPYC, torch 2.13, took 2.9 ms both in a loop and in ``grouped_mm``, and 1.4 ms as a batch. A
    product of a new shape is expensive too, because its code is generated first: 0.3 ms and more.
    Therefore numbers of rows are rounded and batches are powers of two, which gives about a hundred
    shapes, all of which occur soon. The number of rows of each expert must be known on the host,
    which costs nothing on a CPU.
    """

    by_size = True

    def multiple(self, mean_rows: int) -> int:
        """From 8 to 32 rows, about half of an expert's."""
        return min(32, max(8, 1 << max(1, mean_rows // 2).bit_length() - 1))

    def product(self, rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        out = rows.new_empty(len(rows), weights.shape[-1])
        end = 0
        for experts, begin, end, size in _batches(ends):
            torch.bmm(
                rows[begin:end].view(-1, size, rows.shape[1]),
                weights[experts],
                out=out[begin:end].view(-1, size, out.shape[1]),
            )
        out[end:] = 0.0
        return out

    def outer(self, grad: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
        out = rows.new_empty(len(ends), grad.shape[1], rows.shape[1])
        out[: int((ends == 0).sum())] = 0.0  # they come first
        for experts, begin, end, size in _batches(ends):
            torch.bmm(
                grad[begin:end].view(-1, size, grad.shape[1]).mT,
                rows[begin:end].view(-1, size, rows.shape[1]),
                out=out[experts],
            )
        return out


def _batches(ends: Tensor) -> list[tuple[slice, int, int, int]]:
    """Batches of adjacent experts with equal numbers of rows: experts, first row, row after the
    last, rows of each.

    The number of experts is a power of two. Experts without rows are skipped.
    """
    found, expert, begin = [], 0, 0
    for size, run in groupby(torch.diff(ends, prepend=ends.new_zeros(1)).tolist()):
        remaining = len(list(run))
        if not size:
            expert += remaining
            continue
        while remaining:
            number = 1 << remaining.bit_length() - 1
            found.append((slice(expert, expert + number), begin, begin + number * size, size))
            expert, begin, remaining = expert + number, begin + number * size, remaining - number
    return found


def _is_used(ends: Tensor, num_rows: int) -> Tensor:
    """Boolean ``[R, 1]``: whether a row belongs to an expert."""
    return (torch.arange(num_rows, device=ends.device) < ends[-1])[:, None]


# One custom operator, opaque to the compiler: its work depends on the number of rows of experts.
@torch.library.custom_op("ultrathink::grouped_product", mutates_args=())
def _grouped_product(
    rows: Tensor, weights: Tensor, ends: Tensor, backend: str, transposed: bool
) -> Tensor:
    kernel: ExpertBackend = EXPERT_BACKENDS.load(backend)()
    result: Tensor = kernel.product(rows.contiguous(), weights if transposed else weights.mT, ends)
    return result


@_grouped_product.register_fake
def _(rows: Tensor, weights: Tensor, ends: Tensor, backend: str, transposed: bool) -> Tensor:
    return rows.new_empty(rows.shape[0], weights.shape[2 if transposed else 1])


@torch.library.custom_op("ultrathink::grouped_outer", mutates_args=())
def _grouped_outer(grad: Tensor, rows: Tensor, ends: Tensor, backend: str) -> Tensor:
    kernel: ExpertBackend = EXPERT_BACKENDS.load(backend)()
    result: Tensor = kernel.outer(grad.contiguous(), rows.contiguous(), ends)
    return result


@_grouped_outer.register_fake
def _(grad: Tensor, rows: Tensor, ends: Tensor, backend: str) -> Tensor:
    return rows.new_empty(ends.shape[0], grad.shape[1], rows.shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weights, ends, ctx.backend, transposed = inputs
    assert not transposed, "that product is part of a gradient"
    ctx.save_for_backward(rows, weights, ends)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, weights, ends = ctx.saved_tensors
    grad_rows = _grouped_product(grad, weights, ends, ctx.backend, True)
    grad_weights = _grouped_outer(grad, rows, ends, ctx.backend)
    return grad_rows, grad_weights, None, None, None


_grouped_product.register_autograd(_gradients, setup_context=_keep)


def grouped_product(rows: Tensor, weights: Tensor, ends: Tensor, backend: str) -> Tensor:
    """``rows[r] @ weights[e].T`` for each row r and its expert e: ``[R, O]``.

    ``rows`` is ``[R, I]``, ``weights`` ``[E, O, I]`` of the same dtype, ``ends`` int32 ``[E]``.
    ``backend`` names a registered ``ExpertBackend``.
    """
    product: Tensor = _grouped_product(rows, weights, ends, backend, False)
    return product
