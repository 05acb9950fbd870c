"""Rotary position embedding. https://arxiv.org/abs/2104.09864

Scaling: linear https://arxiv.org/abs/2306.15595, yarn https://arxiv.org/abs/2309.00071, llama3
https://arxiv.org/abs/2407.21783. Formulas and the order of the halves are those of Hugging Face.

Shapes: B batch, T tokens, H heads, D head dimension, P positions in the tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ultrathink.config.model import ModelConfig, RopeScalingConfig

INITIAL_POSITIONS = 4096


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScalingConfig | None) -> Tensor:
    """Radians per position of each pair of dimensions, ``[D / 2]`` in float64 on the CPU."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim
    inverse = 1.0 / theta**exponents
    if scaling is None:
        return inverse
    if scaling.type == "linear":
        return inverse / scaling.factor
    if scaling.type == "yarn":
        return _yarn(inverse, head_dim, theta, scaling)
    return _llama3(inverse, scaling)


def attention_factor(scaling: RopeScalingConfig | None) -> float:
    """The factor of cos and sin: 1 except with yarn."""
    if scaling is None or scaling.type != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0


def _yarn(inverse: Tensor, head_dim: int, theta: float, scaling: RopeScalingConfig) -> Tensor:
    """Blend scaled and unscaled frequencies by their number of turns in the old context."""

    def dimension_of(turns: float) -> float:
        wavelengths = scaling.original_max_positions / (turns * 2 * math.pi)
        return head_dim * math.log(wavelengths) / (2 * math.log(theta))

    low = max(math.floor(dimension_of(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension_of(scaling.beta_slow)), head_dim - 1)
    width = high - low if high != low else 0.001
    pairs = torch.arange(head_dim // 2, dtype=torch.float64, device="cpu")
    stretched = ((pairs - low) / width).clamp(0, 1)
    return inverse / scaling.factor * stretched + inverse * (1 - stretched)


def _llama3(inverse: Tensor, scaling: RopeScalingConfig) -> Tensor:
    """Scale long wavelengths, keep short ones, and blend smoothly in between."""
    turns = scaling.original_max_positions * inverse / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * inverse / scaling.factor + kept * inverse


class RotaryEmbedding(nn.Module):
    """Cosines and sines of positions, from tables that keep their precision.

    The tables are ``[P, D / 2]``, computed in float64 and stored in float32 (float64 in a float64
    model), also after ``.half()`` or ``.bfloat16()`` on the model. They are not part of a
    checkpoint.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.head_dim is not None, "the configuration is resolved first"
        self.head_dim = config.head_dim
        self.theta = config.rope_theta
        self.scaling = config.rope_scaling
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        device = torch.empty(0).device  # the default device, which may be "meta"
        self._set_tables(INITIAL_POSITIONS, device, dtype)

    def forward(self, positions: Tensor | None, num_tokens: int, offset: int = 0) -> Tensor:
        """Cosines and sines, ``[2, 1 or B, 1, T, D / 2]``, broadcastable over heads.

        ``positions`` is ``[T]`` or ``[B, T]``; None counts from ``offset``. The tables grow
        automatically to ``offset + T``, and to any position on the CPU; on other devices, and in
        compiled code, call ``reserve`` before using larger positions.
        """
        length = offset + num_tokens
        if positions is not None and positions.device.type == "cpu" and not _is_traced():
            length = max(length, _highest(positions) + 1)
        cos, sin = self._tables_up_to(length)
        if positions is None:
            cos, sin = cos[offset:length], sin[offset:length]
        else:
            cos, sin = cos[positions], sin[positions]
        if cos.dim() == 2:
            cos, sin = cos.unsqueeze(0), sin.unsqueeze(0)
        return torch.stack((cos, sin)).unsqueeze(2)

    def reserve(self, num_positions: int) -> None:
        """Extend the tables to at least ``num_positions``."""
        if num_positions > self.cos.shape[0]:
            length = 1 << (num_positions - 1).bit_length()
            self._set_tables(length, self.cos.device, self.cos.dtype)

    def reset_tables(self) -> None:
        """Compute the tables again, on the device they are on (after ``to_empty``)."""
        self._set_tables(self.cos.shape[0], self.cos.device, self.cos.dtype)

    def _tables_up_to(self, length: int) -> tuple[Tensor, Tensor]:
        if length <= self.cos.shape[0]:
            return self.cos, self.sin
        if _is_traced():  # a compiled graph computes them without changing the module
            return self._compute(length, self.cos.device, self.cos.dtype)
        self.reserve(length)
        return self.cos, self.sin

    def _compute(
        self, length: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        positions = torch.arange(length, dtype=torch.float64, device="cpu")
        inverse = inverse_frequencies(self.head_dim, self.theta, self.scaling)
        angles = positions[:, None] * inverse
        factor = attention_factor(self.scaling)
        cos, sin = angles.cos() * factor, angles.sin() * factor
        return cos.to(dtype).to(device), sin.to(dtype).to(device)

    def _set_tables(self, length: int, device: torch.device, dtype: torch.dtype) -> None:
        if device.type == "meta":
            cos = sin = torch.empty(length, self.head_dim // 2, device=device, dtype=dtype)
        else:
            cos, sin = self._compute(length, device, dtype)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        """Move the tables with the model, but convert them to no other precision than float64."""
        moved = fn(torch.zeros(1, dtype=self.cos.dtype, device=self.cos.device))
        dtype = torch.promote_types(moved.dtype, torch.float32)
        if (moved.device, dtype) != (self.cos.device, self.cos.dtype):
            self._set_tables(self.cos.shape[0], moved.device, dtype)
        return self


def apply_rotary(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate ``[B, H, T, D]`` by the angles of ``RotaryEmbedding``, in at least their precision.

    Dimension ``i`` is paired with ``i + D / 2``, as in Hugging Face's ``rotate_half``.
    """
    rotated: Tensor = _Rotation.apply(x, cos_sin[0], cos_sin[1])  # type: ignore[no-untyped-call]
    return rotated


class _Rotation(torch.autograd.Function):
    """Rotates gradients back by the same angle in one pass; autograd's version scatters over the
    halves, which compiles to code without SIMD."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad_outputs[0], cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)


def _highest(positions: Tensor) -> int:
    """The largest position; ValueError for a negative one."""
    if positions.numel() == 0:
        return -1
    lowest, highest = torch.aminmax(positions)
    if lowest < 0:
        raise ValueError(f"positions count from 0; {int(lowest)} was given.")
    return int(highest)


def _is_traced() -> bool:
    return torch.compiler.is_compiling()
