"""Kernels of causal attention, one signature for all. https://arxiv.org/abs/1706.03762

Shapes: B batch, H query heads, K key/value heads, G = H / K queries of a group, T queries, S keys,
D head dimension. Each kernel maps query ``[B, H, T, D]``, key and value ``[B, K, S, D]`` to
``[B, H, T, D]``; softmax runs in at least float32. One that takes no mask says so by an attribute
``takes_masks`` that is false.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ultrathink.model.attention_mask import AttentionMask
from ultrathink.model.block_attention import at_least_float32, block_attention

AttentionBackend: TypeAlias = Callable[[Tensor, Tensor, Tensor, AttentionMask | None], Tensor]

# Backends that use `AttentionMask.document_ids` directly; others get a dense mask.
READS_DOCUMENTS = frozenset({"blocks"})
_IS_DENSE = "only READS_DOCUMENTS backends get a mask that is not dense"
LONGEST_FOR_BLOCKS = {  # in tokens, by (compiled, dtype)
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
    saves the memory. (``blocks`` has become faster since: by a quarter, compiled, in bfloat16.)
    """
    if device_type != "cpu" or dtype not in (torch.bfloat16, torch.float32):
        return "sdpa"
    longest = LONGEST_FOR_BLOCKS[compiled, dtype]
    return "blocks" if seq_len <= longest else "sdpa"


def sdpa_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask | None = None
) -> Tensor:
    """PyTorch's fused attention."""
    if mask is None:
        causal = query.shape[2] == key.shape[2]
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
    assert mask.dense is not None, _IS_DENSE
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # not every device has a fused kernel with both a mask and grouped heads
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask.dense)
    return _blank(out, mask)


def eager_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask | None = None
) -> Tensor:
    """Attention written out, with all scores in memory: the reference for the others."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2)
    scores = scores.to(at_least_float32(scores)) * query.shape[-1] ** -0.5
    if mask is None:
        T, S = scores.shape[-2:]
        allowed = torch.ones(T, S, dtype=torch.bool, device=scores.device).tril(S - T)
        scores = scores.masked_fill(~allowed, float("-inf"))
        return torch.matmul(scores.softmax(-1).to(value.dtype), value)
    assert mask.dense is not None, _IS_DENSE
    if mask.dense.dtype == torch.bool:
        scores = scores.masked_fill(~mask.dense, float("-inf"))
    else:
        scores = scores + mask.dense
    return _blank(torch.matmul(scores.softmax(-1).to(value.dtype), value), mask)


def block_causal_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask | None = None
) -> Tensor:
    """Attention as explicit products in up to four blocks of queries, for training on the CPU.

    With a dense mask or keys from a cache this is ``sdpa_attention``.
    """
    if (mask is not None and mask.dense is not None) or key.shape[2] != query.shape[2]:
        return sdpa_attention(query, key, value, mask)
    return block_attention(query, key, value, None if mask is None else mask.document_ids)


def _blank(out: Tensor, mask: AttentionMask) -> Tensor:
    """Zero the rows that see nothing, in the result and in its gradients."""
    return out if mask.blank_rows is None else out.masked_fill(mask.blank_rows, 0.0)
