"""The one matrix product that every layer uses.

Shapes: ``...`` any leading dimensions, I inputs, O outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """A product with a weight ``[O, I]``, in the precision of its input; a bias ``[O]`` if asked.

    The weight may be float32 while activations are bfloat16: it is cast here, explicitly, so that
    its gradient has the weight's precision. ``row_splits`` are the numbers of outputs of matrices
    fused into one product, which an optimizer may treat separately.
    """

    def __init__(
        self, in_features: int, out_features: int, *row_splits: int, bias: bool = False
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.row_splits = row_splits or (out_features,)
        assert sum(self.row_splits) == out_features, "the splits are the outputs"
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``[..., I]`` to ``[..., O]``."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"
