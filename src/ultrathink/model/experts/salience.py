"""What each expert contributes to the output of a layer, for tokens that are passed through it.

The salience of an expert is the mean of ``gate · ‖expert(x)‖`` over the tokens sent to it (REAP,
https://arxiv.org/abs/2510.13999, eq. 9): the expert with the least is missed least.

Shapes: N tokens, C hidden size, E slots for experts, K experts of a token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ultrathink.model.experts.layer import Experts
from ultrathink.model.experts.router import Choice


class Contributions(NamedTuple):
    """Sums over tokens, in float64."""

    tokens: Tensor
    """``[E]``: tokens sent to each expert."""

    norms: Tensor
    """``[E]``: the gated norms of its outputs for them."""

    inputs: Tensor
    """``[E, C]``: those tokens' states."""


@torch.no_grad()
def contributions(experts: Experts, x: Tensor, choice: Choice, counted: Tensor) -> Contributions:
    """The contributions of all experts of a layer to its output for ``x`` ``[N, C]``.

    Only tokens count that are ``counted``, boolean ``[N]``.
    """
    tokens = torch.zeros(experts.num_slots, dtype=torch.float64, device=x.device)
    norms, inputs = tokens.clone(), tokens.new_zeros(experts.num_slots, x.shape[1])
    weights = zip(experts.inner.unbind(0), experts.down.unbind(0), strict=True)
    for slot, (inner, down) in enumerate(weights):
        rows, places = ((choice.experts == slot) & counted[:, None]).nonzero(as_tuple=True)
        if not len(rows):
            continue
        read = x[rows]
        out = F.linear(experts.activated(F.linear(read, inner.to(x.dtype))), down.to(x.dtype))
        gates = choice.gates[rows, places].double()
        tokens[slot] = len(rows)
        norms[slot] = (gates * out.double().norm(dim=-1)).sum()
        inputs[slot] = read.double().sum(0)
    return Contributions(tokens, norms, inputs)
