"""A layer for some of the tokens: ``x + gate · layer(x)`` for the chosen ones, ``x`` for others.

In training the number of rows is fixed by the capacity. In evaluation as many rows are computed as
there are chosen tokens, and in a compiled graph, whose shapes are fixed, all of them.

Shapes: B rows of a batch, T tokens, R rows of chosen tokens, C hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from ultrathink.config.depth import EIGHTHS
from ultrathink.model.attention_mask import AttentionMask
from ultrathink.model.depth.router import Decision, DepthPass
from ultrathink.model.depth.rows import (
    Rows,
    angles_of_rows,
    mask_of_rows,
    rows_of,
    sequences_of_rows,
)
from ultrathink.model.experts.router import LayerRouting, RoutingPass
from ultrathink.model.experts.sequences import Sequences

Fed: TypeAlias = tuple[Tensor, LayerRouting | None]
FeedForward: TypeAlias = Callable[[Tensor, RoutingPass | None], Fed]
"""From normalized states ``[B, T, C]`` to results of that shape, and the statistics of experts."""

Body: TypeAlias = Callable[[Tensor, Tensor, AttentionMask | None, RoutingPass | None], Fed]
"""The same for a whole block; from states of the residual stream, with angles and a mask."""


def feed_chosen(
    feed: FeedForward,
    states: Tensor,
    decision: Decision,
    depth: DepthPass,
    routed: RoutingPass | None,
    *,
    training: bool,
) -> Fed:
    """``feed`` for the chosen tokens of ``states`` ``[B, T, C]``, zero for the others."""
    if depth.eighths == EIGHTHS:
        out, routing = feed(states, routed)
    elif training:
        rows = rows_of(decision.chosen, decision.num_rows)
        out, routing = feed(rows.gather(states), _of_rows(routed, rows))
        out = rows.scatter(out)
    elif torch.compiler.is_compiling():
        if routed is not None:
            routed = _of_chosen(routed, decision.chosen)
        out, routing = feed(states, routed)
    else:
        return _feed_few(feed, states, decision, routed)
    return _weighted(out, decision), routing


def _feed_few(
    feed: FeedForward, states: Tensor, decision: Decision, routed: RoutingPass | None
) -> Fed:
    """Each chosen token as a sequence of its own: no other token changes its result."""
    index = decision.chosen.flatten().nonzero()[:, 0]
    if routed is not None and not len(index) and torch.is_grad_enabled():
        index = index.new_zeros(1)  # experts need a token to have gradients; it has the gate 0
    few = states.flatten(0, 1)[index][:, None]  # [R, 1, C]
    if routed is not None:
        counted = _of_chosen(routed, decision.chosen).sequences.counted
        counted = counted.flatten(0, 1)[index][:, None]
        path, num_tokens = routed.path, states.shape[1]
        factors = {
            name: factor[index // num_tokens]
            if isinstance(factor, Tensor) and factor.dim()
            else factor
            for name, factor in path.group_factors.items()
        }
        routed = routed._replace(
            sequences=Sequences(counted, None, torch.ones_like(counted)),
            path=replace(path, group_factors=factors),
            group_targets=None,  # nothing is trained here
        )
    out, routing = feed(few, routed)
    flat = torch.zeros_like(states).flatten(0, 1)
    return _weighted(flat.index_copy(0, index, out[:, 0]).view_as(states), decision), routing


def run_chosen(
    body: Body,
    x: Tensor,
    cos_sin: Tensor,
    mask: AttentionMask | None,
    decision: Decision,
    depth: DepthPass,
    routed: RoutingPass | None,
    *,
    training: bool,
) -> Fed:
    """What ``body`` adds to the chosen tokens of the residual stream ``x`` ``[B, T, C]``.

    They see only each other, at their original positions.
    """
    if depth.eighths == EIGHTHS:
        out, routing = body(x, cos_sin, mask, routed)
        return _weighted(out, decision), routing
    num_rows = decision.num_rows
    if not training:
        is_compiled = torch.compiler.is_compiling()
        num_rows = x.shape[1] if is_compiled else int(decision.chosen.sum(1).max())
        if not num_rows and routed is None:
            return torch.zeros_like(x), None
        num_rows = max(1, num_rows)  # experts report in every pass
    rows = rows_of(decision.chosen, num_rows)
    out, routing = body(
        rows.gather(x),
        angles_of_rows(cos_sin, rows),
        mask_of_rows(mask, rows),
        _of_rows(routed, rows),
    )
    return _weighted(rows.scatter(out), decision), routing


def run_all(
    body: Body,
    x: Tensor,
    cos_sin: Tensor,
    mask: AttentionMask | None,
    decision: Decision,
    depth: DepthPass,
    routed: RoutingPass | None,
) -> Fed:
    """The same with a cache, which has a place for every token and hides those that pass by.

    All tokens of the pass are computed.
    """
    if routed is not None:
        routed = _of_chosen(routed, decision.chosen)
    out, routing = body(x, cos_sin, mask, routed)
    return _weighted(out, decision), routing


def _weighted(out: Tensor, decision: Decision) -> Tensor:
    """``out`` ``[B, T, C]`` times its gates; zero for tokens that pass by."""
    if decision.gates is not None:
        return out * decision.gates.to(out.dtype)
    return torch.where(decision.chosen[..., None], out, 0.0)


def _of_rows(routed: RoutingPass | None, rows: Rows) -> RoutingPass | None:
    if routed is None:
        return None
    targets = routed.group_targets
    return routed._replace(
        sequences=sequences_of_rows(routed.sequences, rows),
        group_targets=None if targets is None else rows.gather(targets.float()) > 0,
    )


def _of_chosen(routed: RoutingPass, chosen: Tensor) -> RoutingPass:
    sequences = routed.sequences
    counted = sequences.counted * chosen[..., None].to(sequences.counted)
    return routed._replace(sequences=sequences._replace(counted=counted))
