"""Feed-forward layers, applied to each token separately.

SwiGLU https://arxiv.org/abs/2002.05202, squared ReLU https://arxiv.org/abs/2109.08668.

Shapes: B batch, T tokens, C hidden size, M intermediate size.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ultrathink.config.model import ModelConfig
from ultrathink.model.linear import Linear


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))`` with gate and up in one product.

    Rows ``[:M]`` of ``gate_up.weight`` are the gate, rows ``[M:]`` the up projection.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.intermediate_size is not None, "the configuration is resolved first"
        width = config.intermediate_size
        self.gate_up = Linear(config.hidden_size, 2 * width, width, width)
        self.down = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, T, C]`` to ``[B, T, C]``."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        out: Tensor = self.down(F.silu(gate) * up)
        return out


class ReLUSquared(nn.Module):
    """``down(relu(up(x))²)``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.intermediate_size is not None, "the configuration is resolved first"
        self.up = Linear(config.hidden_size, config.intermediate_size)
        self.down = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, T, C]`` to ``[B, T, C]``."""
        out: Tensor = self.down(F.relu(self.up(x)).square())
        return out
