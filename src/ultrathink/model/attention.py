"""Self-attention with grouped queries. https://arxiv.org/abs/2305.13245

Shapes: B batch, T tokens, C hidden size, H query heads, K key/value heads, D head dimension.
"""

from __future__ import annotations

from torch import Tensor, nn

from ultrathink.config.model import ModelConfig
from ultrathink.model.attention_backends import AttentionBackend
from ultrathink.model.attention_mask import AttentionMask
from ultrathink.model.cache import CacheView
from ultrathink.model.linear import Linear
from ultrathink.model.norm import RMSNorm
from ultrathink.model.rope import apply_rotary


class Attention(nn.Module):
    """Causal self-attention; queries, keys and values come from one product.

    Rows of ``qkv.weight`` (and of ``qkv.bias``, if configured) are H·D of the queries, K·D of the
    keys, K·D of the values, each head by head. ``layer`` is the layer's index in a cache.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.num_kv_heads is not None, "the configuration is resolved first"
        assert config.head_dim is not None, "the configuration is resolved first"
        self.layer = layer
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        query_width = self.num_heads * self.head_dim
        key_width = self.num_kv_heads * self.head_dim
        widths = (query_width, key_width, key_width)
        self.qkv = Linear(config.hidden_size, sum(widths), *widths, bias=config.qkv_bias)
        self.output = Linear(self.num_heads * self.head_dim, config.hidden_size)
        self.query_norm: RMSNorm | None = None
        self.key_norm: RMSNorm | None = None
        if config.qk_norm:
            self.query_norm = RMSNorm(self.head_dim, config.norm_eps)
            self.key_norm = RMSNorm(self.head_dim, config.norm_eps)

    def forward(
        self,
        x: Tensor,
        cos_sin: Tensor,
        mask: AttentionMask | None,
        backend: AttentionBackend,
        cache: CacheView | None,
        present: Tensor | None = None,
    ) -> Tensor:
        """Map ``[B, T, C]`` to ``[B, T, C]``; without a ``mask`` the cache provides one.

        With ``present`` (boolean ``[B, T]``) a cache hides the other tokens, here and later.
        """
        B, T, _ = x.shape
        heads = self.qkv(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        query, key, value = heads.split(
            [self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1
        )
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = apply_rotary(query, cos_sin), apply_rotary(key, cos_sin)
        if cache is not None:
            key, value = cache.update(self.layer, key, value, present)
            mask = cache.visible(self.layer) if mask is None else mask
        attended = backend(query, key, value, mask)  # [B, H, T, D]
        out: Tensor = self.output(attended.transpose(1, 2).reshape(B, T, -1))
        return out
