"""The attention mask, built once per forward pass for all layers.

Shapes: B batch, H heads, T queries, S keys (S - T of them from a cache).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class AttentionMask(NamedTuple):
    """Limits of attention in addition to causality; each part is None if it has no effect."""

    document_ids: Tensor | None = None
    """``[B, T]`` int32: positions see only their own document (S equals T)."""

    dense: Tensor | None = None
    """``[B or 1, 1 or H, T, S]``, causality and documents included: boolean (True = attend) or
    additive in the dtype of the queries. No row of it is blocked entirely."""

    blank_rows: Tensor | None = None
    """Boolean ``[B or 1, 1 or H, T, 1]``: rows that may see nothing and whose result is zero."""


def build_mask(
    *,
    batch_size: int,
    num_heads: int,
    num_queries: int,
    num_keys: int,
    dtype: torch.dtype,
    device: torch.device,
    attention_mask: Tensor | None,
    document_ids: Tensor | None,
    dense_documents: bool,
    starts: Sequence[int] | None = None,
) -> AttentionMask | None:
    """Combine causality with the caller's mask and with documents.

    ``attention_mask`` is boolean (True = attend) or additive, ``[B, S]`` or broadcastable to
    ``[B, H, T, S]``. The first query of each row is at the key ``starts[b]``; without ``starts``
    the last query is at the last key. Returns None if causality with T = S, or a single query that
    sees everything, is sufficient. Raises ValueError for a mask of another shape or dtype.
    """
    if attention_mask is None and document_ids is not None and not dense_documents:
        return AttentionMask(document_ids=document_ids.to(torch.int32))
    if attention_mask is None and document_ids is None and num_queries in (1, num_keys):
        return None
    starts = (num_keys - num_queries,) if starts is None else starts
    allowed = causal_mask(starts, num_queries, num_keys, device)
    if document_ids is not None:
        same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
        allowed = allowed & same
    if attention_mask is None:
        return AttentionMask(dense=allowed)
    mask = _as_four_dims(attention_mask, (batch_size, num_heads, num_queries, num_keys))
    if mask.dtype == torch.bool:
        allowed = allowed & mask
        blank = ~allowed.any(-1, keepdim=True)
        return AttentionMask(dense=allowed | blank, blank_rows=blank)
    bias = mask.to(dtype)
    allowed = allowed & (bias > torch.finfo(dtype).min)
    blank = ~allowed.any(-1, keepdim=True)
    bias = bias.masked_fill(~allowed, float("-inf")).masked_fill(blank, 0.0)
    return AttentionMask(dense=bias, blank_rows=blank)


def causal_mask(
    starts: Sequence[int], num_queries: int, num_keys: int, device: torch.device
) -> Tensor:
    """Boolean ``[B, 1, T, S]``, True where a key is at or before the query.

    The first query of row ``b`` is at the key ``starts[b]``. Rows with equal starts may be merged.
    """
    queries = torch.arange(num_queries, device=device)[:, None]
    keys = torch.arange(num_keys, device=device)
    first = torch.tensor(starts, device=device)[:, None, None, None] if any(starts) else 0
    return (keys <= queries + first).expand(len(starts), 1, -1, -1)


def _as_four_dims(mask: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    B, H, T, S = shape
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(
            f"attention_mask has dtype {mask.dtype}; use bool (True = attend), for example "
            f"mask.bool(), or a floating point mask that is added to the scores."
        )
    if mask.dim() == 2 and mask.shape == (B, S):
        return mask[:, None, None, :]
    fits = mask.dim() == 4 and all(
        given in (1, wanted) for given, wanted in zip(mask.shape, shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"attention_mask has shape {list(mask.shape)}; use [{B}, {S}] (one entry a key, those "
            f"in the cache included) or one that broadcasts to [{B}, {H}, {T}, {S}]."
        )
    return mask
