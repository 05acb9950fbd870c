"""The token embedding.

Shapes: B batch, T tokens, V vocabulary, C hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Embedding(nn.Module):
    """A table ``[V, C]``; unlike torch's it is uninitialized until ``init.py`` sets it.

    Its gradient is bit-identical in every run, compiled or not.
    """

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, input_ids: Tensor) -> Tensor:
        """Look ``[B, T]`` ids up to ``[B, T, C]``."""
        rows: Tensor = _Lookup.apply(input_ids, self.weight)  # type: ignore[no-untyped-call]
        return rows

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}"


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(input_ids)
        ctx.num_rows = weight.shape[0]
        return F.embedding(input_ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (input_ids,) = ctx.saved_tensors
        return None, _gradient(grad, input_ids, ctx.num_rows)


# A custom operator, because the compiler would turn torch's into atomic additions, whose order,
# and with it the last bits of the sum, differs from run to run.
@torch.library.custom_op("ultrathink::embedding_gradient", mutates_args=())
def _gradient(grad: Tensor, input_ids: Tensor, num_rows: int) -> Tensor:
    result: Tensor = torch.ops.aten.embedding_dense_backward(grad, input_ids, num_rows, -1, False)
    return result


@_gradient.register_fake
def _(grad: Tensor, input_ids: Tensor, num_rows: int) -> Tensor:
    return grad.new_empty(num_rows, grad.shape[-1])
