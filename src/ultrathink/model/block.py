"""A block of the decoder: attention and a feed-forward layer, or experts.

Shapes: B batch, T tokens, C hidden size.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ultrathink.config.model import FEED_FORWARDS, ModelConfig
from ultrathink.model.attention import Attention
from ultrathink.model.attention_backends import AttentionBackend
from ultrathink.model.attention_mask import AttentionMask
from ultrathink.model.cache import CacheView
from ultrathink.model.depth.block import run_routed
from ultrathink.model.depth.layer import Fed
from ultrathink.model.depth.router import DepthPass, DepthRouter, LayerDepth
from ultrathink.model.experts.layer import MixtureOfExperts
from ultrathink.model.experts.router import LayerRouting, RoutingPass
from ultrathink.model.norm import RMSNorm


class Block(nn.Module):
    """Attention and a feed-forward layer, each with a norm before and a residual connection."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.has_experts = layer in config.expert_layers
        self.feed_forward = (
            MixtureOfExperts(config)
            if self.has_experts
            else FEED_FORWARDS.load(config.feed_forward)(config)
        )
        self.depth: DepthRouter | None = None
        if config.mod is not None and layer in config.depth_layers:
            self.depth = DepthRouter(config.mod, config.hidden_size, layer)

    def forward(
        self,
        x: Tensor,
        cos_sin: Tensor,
        mask: AttentionMask | None,
        backend: AttentionBackend,
        cache: CacheView | None,
        routed: RoutingPass | None = None,
        depth: DepthPass | None = None,
    ) -> tuple[Tensor, LayerRouting | None, LayerDepth | None]:
        """Map the residual stream ``[B, T, C]`` to ``[B, T, C]``; also returns the statistics of
        experts and of depth routing.

        A block with experts needs ``routed``, one that tokens may pass by ``depth``.
        """
        if self.depth is not None:
            return run_routed(self, x, cos_sin, mask, backend, cache, routed, depth)
        x = self.attend(x, cos_sin, mask, backend, cache)
        fed, routing = self.feed(self.feed_forward_norm(x), routed)
        return x + F.dropout(fed, self.dropout, self.training), routing, None

    def feed(self, states: Tensor, routed: RoutingPass | None) -> Fed:
        """The feed-forward layer, or the experts, of normalized states ``[B, T, C]``."""
        if not self.has_experts:
            return self.feed_forward(states), None
        assert routed is not None, "experts need sequences, controls and a path"
        fed: Fed = self.feed_forward(states, routed)
        return fed

    def attend(
        self,
        x: Tensor,
        cos_sin: Tensor,
        mask: AttentionMask | None,
        backend: AttentionBackend,
        cache: CacheView | None,
    ) -> Tensor:
        """The first half of ``forward``: attention, added to the residual stream."""
        attended = self.attention(self.attention_norm(x), cos_sin, mask, backend, cache)
        return x + F.dropout(attended, self.dropout, self.training)

    def hook_free_parts(self) -> list[tuple[nn.Module, str]]:
        """The largest methods that call no sharded module of their own: modules and names.

        Experts are sharded by themselves, so that a path without them does not gather them.
        """
        if not isinstance(self.feed_forward, MixtureOfExperts):
            return [(self, "forward")]
        parts: list[tuple[nn.Module, str]] = [(self, "attend")]
        moe = self.feed_forward
        inside = (moe.router, moe.experts, moe.shared, self.depth)
        return parts + [(module, "forward") for module in inside if module is not None]
