"""Kernels of causal attention, one signature for all. https://arxiv.org/abs/1706.03762

Shapes: B batch, H query heads, K key/value heads, G = H / K queries of a group, T queries, S keys,
D head dimension. Each kernel maps query ``[B, H, T, D]``, key and value ``[B, K, S, D]`` to
``[B, H, T, D]``; softmax runs in at least float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ultrathink.model.attention_mask import AttentionMask

AttentionBackend: TypeAlias = Callable[[Tensor, Tensor, Tensor, AttentionMask | None], Tensor]

# Backends that take `AttentionMask.document_ids` as they are; others are given a dense mask.
READS_DOCUMENTS = frozenset({"blocks"})
MAX_BLOCKS = 4
MIN_BLOCK_TOKENS = 16
_LONGEST_FOR_BLOCKS = {  # in tokens, by (compiled, dtype)
    (True, torch.bfloat16): 1024,
    (True, torch.float32): 512,
    (False, torch.bfloat16): 512,
    (False, torch.float32): 0,
}


def choose_backend(device_type: str, dtype: torch.dtype, seq_len: int, compiled: bool) -> str:
    """The name of the fastest backend for training at ``seq_len`` tokens.

    Forward and backward of 2,048 tokens, 8 heads of 32, 4 key/value heads, one thread of a CPU with
    bfloat16 instructions, torch 2.13, in ms (sdpa / blocks): compiled bfloat16 at 256 tokens 34 /
    12, at 512 52 / 17, at 1,024 56 / 34; eager bfloat16 35 / 24, 51 / 30, 59 / 61; compiled
    float32 at 256 27 / 19, at 1,024 76 / 75; eager float32 25 / 26, 74 / 98. The scores of
    ``blocks`` are kept for the backward pass, a square of the length: beyond 1,024 tokens sdpa
    saves the memory.
    """
    if device_type != "cpu" or dtype not in (torch.bfloat16, torch.float32):
        return "sdpa"
    longest = _LONGEST_FOR_BLOCKS[compiled, dtype]
    return "blocks" if seq_len <= longest else "sdpa"


def sdpa_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask | None = None
) -> Tensor:
    """PyTorch's fused attention."""
    if mask is None:
        causal = query.shape[2] == key.shape[2]
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
    assert mask.dense is not None, "only READS_DOCUMENTS backends get a mask that is not dense"
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # fused kernels that take a mask do not take grouped heads on every device
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask.dense)
    return _blank(out, mask)


def eager_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask | None = None
) -> Tensor:
    """Attention written out, every score in memory: the one to compare the others with."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2)
    scores = scores.to(_at_least_float32(scores)) * query.shape[-1] ** -0.5
    if mask is None:
        T, S = scores.shape[-2:]
        allowed = torch.ones(T, S, dtype=torch.bool, device=scores.device).tril(S - T)
        scores = scores.masked_fill(~allowed, float("-inf"))
        return torch.matmul(scores.softmax(-1).to(value.dtype), value)
    assert mask.dense is not None, "only READS_DOCUMENTS backends get a mask that is not dense"
    if mask.dense.dtype == torch.bool:
        scores = scores.masked_fill(~mask.dense, float("-inf"))
    else:
        scores = scores + mask.dense
    return _blank(torch.matmul(scores.softmax(-1).to(value.dtype), value), mask)


def block_causal_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask | None = None
) -> Tensor:
    """Attention as explicit products in up to four blocks of queries, for training on the CPU.

    A block sees only the keys up to its own end, so that most of the upper triangle is never
    computed; the queries of a group are rows of one product. With a dense mask or keys from a
    cache this is ``sdpa_attention``.
    """
    B, H, T, D = query.shape
    K = key.shape[1]
    if (mask is not None and mask.dense is not None) or key.shape[2] != T:
        return sdpa_attention(query, key, value, mask)
    documents = None if mask is None else mask.document_ids
    # [B * K, T * G, D]: rows of one token lie together, so that a block is one slice.
    rows = query.view(B, K, H // K, T, D).transpose(2, 3).reshape(B * K, T * (H // K), D)
    keys, values = key.reshape(B * K, T, D), value.reshape(B * K, T, D)
    outputs = [
        _attend_block(rows, keys, values, documents, start, min(start + step, T))
        for step in [_block_tokens(T)]
        for start in range(0, T, step)
    ]
    out = torch.cat(outputs, 1).view(B, K, T, H // K, D)
    return out.transpose(2, 3).reshape(B, H, T, D)


def _attend_block(
    rows: Tensor, keys: Tensor, values: Tensor, documents: Tensor | None, start: int, stop: int
) -> Tensor:
    """Attention of the queries ``start`` to ``stop`` to the keys before ``stop``."""
    groups = rows.shape[1] // keys.shape[1]
    rows = rows[:, start * groups : stop * groups]
    scores = torch.bmm(rows, keys[:, :stop].transpose(1, 2))
    shape = scores.shape
    scores = scores.to(_at_least_float32(scores)) * rows.shape[-1] ** -0.5
    allowed = _causal_block(start, stop, scores.device)  # [n, stop]
    scores = scores.view(shape[0], stop - start, groups, stop)
    if documents is None:
        scores = scores.masked_fill(~allowed[None, :, None], float("-inf"))
    else:
        same = documents[:, start:stop, None] == documents[:, None, :stop]
        allowed = (allowed & same)[:, None, :, None]  # [B, 1, n, 1, stop]
        scores = scores.view(documents.shape[0], -1, stop - start, groups, stop)
        scores = scores.masked_fill(~allowed, float("-inf"))
    weights = scores.softmax(-1).to(values.dtype).view(shape)
    return torch.bmm(weights, values[:, :stop])


def _causal_block(start: int, stop: int, device: torch.device) -> Tensor:
    queries = torch.arange(start, stop, device=device)
    return torch.arange(stop, device=device) <= queries[:, None]


def _block_tokens(num_tokens: int) -> int:
    """Queries of one block: a quarter of them, in steps of ``MIN_BLOCK_TOKENS``."""
    quarter = -(-num_tokens // MAX_BLOCKS)
    return -(-quarter // MIN_BLOCK_TOKENS) * MIN_BLOCK_TOKENS


def _blank(out: Tensor, mask: AttentionMask) -> Tensor:
    """Zero the rows that may see nothing, in the result and in its gradients."""
    return out if mask.blank_rows is None else out.masked_fill(mask.blank_rows, 0.0)


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
