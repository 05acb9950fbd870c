"""Root mean square normalization. https://arxiv.org/abs/1910.07467

Shapes: ``...`` any leading dimensions, N the normalized width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Divide ``[..., N]`` by its root mean square and scale it by a learned weight ``[N]``.

    Computed in at least float32. The formula is written out because compilers fuse it;
    ``F.rms_norm`` is not fused under autograd on the CPU.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.size = size
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension; the result has the dtype of ``x``."""
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.size}, eps={self.eps}"


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x`` ``[..., N]`` divided by its root mean square and scaled by ``weight`` ``[N]``."""
    precise = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse_rms = torch.rsqrt(precise.square().mean(-1, keepdim=True) + eps)
    return (precise * inverse_rms * weight.to(precise.dtype)).to(x.dtype)
