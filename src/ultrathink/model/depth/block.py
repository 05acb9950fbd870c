"""A block that tokens may pass by, or whose feed-forward layer they may.

Shapes: B rows of a batch, T tokens, C hidden size.
"""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from ultrathink.config.depth import ModConfig
from ultrathink.core.errors import ConfigError
from ultrathink.model.attention_backends import AttentionBackend
from ultrathink.model.attention_mask import AttentionMask
from ultrathink.model.cache import CacheView
from ultrathink.model.depth.layer import Fed, feed_chosen, run_all, run_chosen
from ultrathink.model.depth.router import Decision, DepthPass, DepthRouter, LayerDepth
from ultrathink.model.experts.router import LayerRouting, RoutingPass


class RoutedBlock(Protocol):
    """The parts of a block."""

    training: bool
    dropout: float
    depth: DepthRouter | None

    @property
    def attention_norm(self) -> nn.Module:
        """Before attention."""

    @property
    def attention(self) -> nn.Module:
        """Self-attention."""

    @property
    def feed_forward_norm(self) -> nn.Module:
        """Before the feed-forward layer, or the experts."""

    def feed(self, states: Tensor, routed: RoutingPass | None) -> Fed:
        """The feed-forward layer, or the experts, of normalized states ``[B, T, C]``."""

    def attend(
        self,
        x: Tensor,
        cos_sin: Tensor,
        mask: AttentionMask | None,
        backend: AttentionBackend,
        cache: CacheView | None,
    ) -> Tensor:
        """Attention, added to the residual stream ``[B, T, C]``."""


def run_routed(
    block: RoutedBlock,
    x: Tensor,
    cos_sin: Tensor,
    mask: AttentionMask | None,
    backend: AttentionBackend,
    cache: CacheView | None,
    routed: RoutingPass | None,
    depth: DepthPass | None,
) -> tuple[Tensor, LayerRouting | None, LayerDepth | None]:
    """Map the residual stream ``[B, T, C]`` to ``[B, T, C]`` for the tokens that ``block`` chooses,
    and leave the others as they are; also returns statistics."""
    assert block.depth is not None, "tokens may pass by"
    assert depth is not None, "depth routing needs sequences and a capacity"
    training = block.training
    if block.depth.config.scope == "feed_forward":
        x = block.attend(x, cos_sin, mask, backend, cache)
        states = block.feed_forward_norm(x)
        decision = block.depth(states, depth)
        fed, routing = feed_chosen(block.feed, states, decision, depth, routed, training=training)
        return x + F.dropout(fed, block.dropout, training), routing, decision.report
    decision = block.depth(block.attention_norm(x), depth)

    def body(
        x: Tensor, cos_sin: Tensor, mask: AttentionMask | None, routed: RoutingPass | None
    ) -> Fed:
        present = None if cache is None else decision.chosen
        states = block.attention_norm(x)
        attended = block.attention(states, cos_sin, mask, backend, cache, present)
        attended = F.dropout(attended, block.dropout, training)
        fed, routing = block.feed(block.feed_forward_norm(x + attended), routed)
        return attended + F.dropout(fed, block.dropout, training), routing

    choice: tuple[Decision, DepthPass, RoutingPass | None] = (decision, depth, routed)
    if cache is None:
        added, routing = run_chosen(body, x, cos_sin, mask, *choice, training=training)
    else:
        added, routing = run_all(body, x, cos_sin, mask, *choice)
    return x + added, routing, decision.report


def check_backend(mod: ModConfig, name: str, backend: AttentionBackend) -> None:
    """Raise ConfigError if the attention backend ``name`` cannot hide tokens, where it must."""
    if mod.scope == "block" and not getattr(backend, "takes_masks", True):
        raise ConfigError(
            f"model.mod.scope = 'block' hides the tokens that pass by behind a mask, which the "
            f"attention backend {name!r} does not take; use model.attention.backend=sdpa, or "
            f"model.mod.scope=feed_forward."
        )


def check_no_mask(mod: ModConfig) -> None:
    """Raise ValueError if a cache cannot be used with a mask of the caller."""
    if mod.scope == "block":
        raise ValueError(
            "attention_mask cannot be used with a cache where tokens pass whole blocks by "
            "(model.mod.scope=block); give the lengths of the rows instead."
        )
