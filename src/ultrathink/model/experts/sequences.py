"""Means over the tokens of a sequence, which is a document if documents are isolated.

Balancing statistics are computed for each sequence, so that they do not depend on which sequences
share a micro-batch, a process or a packed row.

Shapes: B rows of a batch, T tokens, S rows of means: T where documents are isolated, else 1.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Sequences(NamedTuple):
    """The sequences of a batch, and which of their tokens count."""

    counted: Tensor
    """``[B, T, 1]``, 1 for tokens that count (those that are trained on), else 0."""

    bounds: tuple[Tensor, Tensor] | None
    """int64 ``[B, T]`` each: first token of a token's document, and the one after its last."""

    num_counted: Tensor
    """``[B, S, 1]``: counted tokens of the sequence, at least 1."""

    @property
    def first(self) -> Tensor:
        """int64 ``[B, T]``: the first token of each token's sequence."""
        if self.bounds is not None:
            return self.bounds[0]
        return torch.zeros(self.counted.shape[:2], dtype=torch.int64, device=self.counted.device)

    def mean(self, values: Tensor) -> Tensor:
        """The mean of ``values`` ``[B, T, X]`` over the counted tokens of each sequence.

        Returns ``[B, S, X]``: one mean for each row, or for each token that of its document.
        """
        first, after = self.bounds if self.bounds is not None else (None, None)
        total: Tensor = _Sum.apply(values * self.counted, first, after)  # type: ignore[no-untyped-call]
        return total / self.num_counted

    def total(self, values: Tensor) -> Tensor:
        """The sum of ``values`` ``[B, S or T, X]`` over all counted tokens: ``[X]``."""
        return (values * self.counted).sum((0, 1))


def find_sequences(
    labels: Tensor | None,
    document_ids: Tensor | None,
    like: Tensor,
    ignored: int,
    lengths: SequenceOf[int] | None = None,
) -> Sequences:
    """The sequences of a batch, in the precision of ``like`` ``[B, T, C]``, at least float32.

    ``labels`` and ``document_ids`` are ``[B, T]``. Tokens with the label ``ignored`` do not count;
    without labels, tokens after the first ``lengths[b]`` of their row do not.
    """
    B, T = like.shape[:2]
    dtype = torch.promote_types(like.dtype, torch.float32)
    if labels is None:
        counted = torch.ones(B, T, 1, dtype=dtype, device=like.device)
        if lengths is not None:
            ends = torch.tensor(lengths, device=like.device)[:, None, None]
            counted = counted * (torch.arange(T, device=like.device)[:, None] < ends)
    else:
        counted = (labels != ignored).to(dtype)[..., None]
    first, after = (None, None) if document_ids is None else _bounds(document_ids)
    num_counted = _sum(counted, first, after).clamp(min=1)
    bounds = None if first is None or after is None else (first, after)
    return Sequences(counted, bounds, num_counted)


def _bounds(document_ids: Tensor) -> tuple[Tensor, Tensor]:
    """First token of each token's document and the one after its last, each ``[B, T]``."""
    T = document_ids.shape[1]
    steps = torch.arange(T, device=document_ids.device).expand_as(document_ids)
    changes = document_ids[:, 1:] != document_ids[:, :-1]
    begins = F.pad(torch.where(changes, steps[:, 1:], 0), (1, 0))
    ends = F.pad(torch.where(changes, steps[:, 1:], T), (0, 1), value=T)
    return begins.cummax(1).values, ends.flip(1).cummin(1).values.flip(1)


def _sum(values: Tensor, first: Tensor | None, after: Tensor | None) -> Tensor:
    """``[B, T, X]`` summed over rows, ``[B, 1, X]``, or for each token over its document."""
    if first is None or after is None:
        return values.sum(1, keepdim=True)
    sums = F.pad(values.cumsum(1), (0, 0, 1, 0))
    begin, end = (bound[..., None].expand_as(values) for bound in (first, after))
    return sums.gather(1, end) - sums.gather(1, begin)


class _Sum(torch.autograd.Function):
    """A sum whose gradient is also a sum over the sequence, without scattering, whose order, and
    with it the last bits, would differ from run to run."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, first: Tensor | None, after: Tensor | None) -> Tensor:
        ctx.save_for_backward(first, after)
        ctx.shape = values.shape
        return _sum(values, first, after)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        first, after = ctx.saved_tensors
        (grad,) = grad_outputs
        total = grad.expand(ctx.shape) if first is None else _sum(grad, first, after)
        return total, None, None
