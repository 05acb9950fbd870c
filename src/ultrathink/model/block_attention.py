"""Causal attention as explicit products in blocks of queries, for training on the CPU.

A block of queries sees only the keys up to its end, so most of the upper triangle is never
computed; the queries of a group are rows of one product. As in https://arxiv.org/abs/2205.14135,
softmax is normalized only after the product with the values, and the backward pass takes the row
sums of P·dP from the output: each pass over the scores then has one read and one write.

Shapes: N batch times key/value heads, G queries of a group, T tokens, R = T · G rows of queries,
those of one token side by side, D head dimension; n rows of a block, S the keys that it sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

MAX_BLOCKS = 4
MIN_BLOCK_TOKENS = 16


def block_attention(query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None) -> Tensor:
    """Map query ``[B, H, T, D]``, key and value ``[B, K, T, D]`` to ``[B, H, T, D]``.

    With ``documents`` ``[B, T]`` a token sees only its own document. The memory layout of the
    result is token by token, as the next product reads it.
    """
    B, H, T, D = query.shape
    K = key.shape[1]
    # Rows of one token are adjacent, so that a block is one slice.
    rows = query.view(B, K, H // K, T, D).transpose(2, 3).reshape(B * K, T * (H // K), D)
    keys, values = key.reshape(B * K, T, D), value.reshape(B * K, T, D)
    out: Tensor = _BlockAttention.apply(rows, keys, values, documents, B)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2)


class _BlockAttention(torch.autograd.Function):
    """``[N, R, D]`` and twice ``[N, T, D]`` to ``[B, T, H, D]``.

    The result is kept for the backward pass in the layout that the next product keeps too, so that
    memory holds it only once.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, keys: Tensor, values: Tensor, documents: Tensor | None, B: int
    ) -> Tensor:
        keys_first = _turned(keys)  # [N, D, T]
        groups = rows.shape[1] // keys.shape[1]
        weights, sums, outputs = [], [], []
        for start, stop in blocks(keys.shape[1]):
            block = rows[:, start * groups : stop * groups]
            scores = torch.bmm(block, keys_first[..., :stop])  # [N, n, S]
            allowed = _allowed(start, stop, documents, scores.device)
            weight = _unnormalized_softmax(scores, allowed, groups, rows.shape[-1])
            # Sum of the rounded weights, so that the weights used add up to one.
            sums.append(weight.to(at_least_float32(rows)).sum(-1, keepdim=True))
            outputs.append(torch.bmm(weight, values[:, :stop]))
            weights.append(weight)
        total = torch.cat(sums, 1)  # [N, R, 1]
        out = torch.cat(outputs, 1).to(total.dtype) / total
        out = _by_token(out, B, keys.shape[1]).to(rows.dtype)
        ctx.save_for_backward(rows, keys, values, out, total, *weights)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        rows, keys, values, out, total, *weights = ctx.saved_tensors
        groups, scale = rows.shape[1] // keys.shape[1], rows.shape[-1] ** -0.5
        # The gradient of the division.
        precise = _by_row(grad_outputs[0], keys.shape).to(total.dtype) / total  # [N, R, D]
        out = _by_row(out, keys.shape).to(total.dtype)
        row_sums = (precise * out).sum(-1, keepdim=True)  # [N, R, 1]
        grad_out = precise.to(rows.dtype)
        cuts = blocks(keys.shape[1])
        grad_rows, grad_keys, grad_values = [], [], []
        for (start, stop), weight in zip(cuts, weights, strict=True):
            of_block = slice(start * groups, stop * groups)
            grad = grad_out[:, of_block]
            # Both [N, D, S]: products with the long side last are 1.5 times as fast.
            grad_values.append(torch.bmm(_turned(grad), weight))
            grad_weight = torch.bmm(grad, values[:, :stop].transpose(1, 2)).to(total.dtype)
            grad_score = weight.to(total.dtype) * (grad_weight - row_sums[:, of_block]) * scale
            grad_score = grad_score.to(rows.dtype)  # [N, n, S]
            grad_rows.append(torch.bmm(grad_score, keys[:, :stop]))
            grad_keys.append(torch.bmm(_turned(rows[:, of_block]), grad_score))
        return (
            torch.cat(grad_rows, 1),
            _added(grad_keys, cuts, total.dtype),
            _added(grad_values, cuts, total.dtype),
            None,
            None,
        )


def _by_token(rows: Tensor, B: int, T: int) -> Tensor:
    """``[N, R, D]`` to ``[B, T, H, D]``."""
    N, R, D = rows.shape
    return rows.view(B, N // B, T, R // T, D).transpose(1, 2).reshape(B, T, -1, D)


def _by_row(heads: Tensor, keys: torch.Size) -> Tensor:
    """``[B, T, H, D]`` to ``[N, R, D]``; ``keys`` is the shape of the keys."""
    (B, T, _, D), N = heads.shape, keys[0]
    return heads.reshape(B, T, N // B, -1, D).transpose(1, 2).reshape(N, -1, D)


def blocks(num_tokens: int) -> list[tuple[int, int]]:
    """First and last (exclusive) query of each block: quarters, in ``MIN_BLOCK_TOKENS``."""
    quarter = -(-num_tokens // MAX_BLOCKS)
    step = -(-quarter // MIN_BLOCK_TOKENS) * MIN_BLOCK_TOKENS
    return [(start, min(start + step, num_tokens)) for start in range(0, num_tokens, step)]


def _allowed(start: int, stop: int, documents: Tensor | None, device: torch.device) -> Tensor:
    """Which keys a token sees, ``[1 or B, 1, stop - start, 1, stop]``."""
    # 32 bits, because SIMD compares twice as many of them as of 64.
    at = torch.arange(stop, dtype=torch.int32, device=device)
    allowed = at <= at[start:, None]
    if documents is None:
        return allowed[None, None, :, None]
    same = documents[:, start:stop, None] == documents[:, None, :stop]
    return (allowed & same)[:, None, :, None]


def _unnormalized_softmax(scores: Tensor, allowed: Tensor, groups: int, head_dim: int) -> Tensor:
    """``exp(scores / √D - their largest)`` of ``[N, n, S]``, zero where nothing may be seen."""
    shape = scores.shape
    batch, tokens, keys = allowed.shape[0], allowed.shape[2], allowed.shape[4]
    precise = scores.to(at_least_float32(scores)) * head_dim**-0.5
    precise = precise.view(batch, -1, tokens, groups, keys)
    precise = torch.where(allowed, precise, float("-inf"))
    weights = (precise - precise.amax(-1, keepdim=True)).exp()
    return weights.to(scores.dtype).view(shape)


def _turned(x: Tensor) -> Tensor:
    """``[N, n, D]`` to ``[N, D, n]``, in memory too."""
    return x.transpose(1, 2).contiguous()


def _added(parts: Sequence[Tensor], cuts: Sequence[tuple[int, int]], dtype: torch.dtype) -> Tensor:
    """The sum ``[N, T, D]`` of parts ``[N, D, S]``, each of which reaches to its block's end."""
    pieces = []
    for number, (start, stop) in enumerate(cuts):
        total = parts[number][..., start:stop].to(dtype)
        for part in parts[number + 1 :]:
            total = total + part[..., start:stop]
        pieces.append(total.to(parts[0].dtype))
    return torch.cat(pieces, -1).transpose(1, 2)


def at_least_float32(x: Tensor) -> torch.dtype:
    """The dtype of softmax: that of ``x``, or float32 if it is less precise."""
    return torch.promote_types(x.dtype, torch.float32)
