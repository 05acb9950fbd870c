"""A weight of each expert group for each token, so that groups compete.

Groups have a router's softmax each, so by themselves all of them answer every token at full
strength. Their weights are ``w = G · softmax(W x)``: 1 on average over the groups of a token, and 1
each at the start, where ``W = 0``. They multiply the gates of a group's experts. That a token
belongs to n of the groups is taught by ``max(0, ln(s / Σ_{g belongs} w_g / G))``, where
``s = (1 + 2n / G) / 3`` is a third of the way from an even share of the weights to all of them.
Beyond it nothing is taught: at all of them the other groups would answer, and learn, no more.

Shapes: B rows of a batch, T tokens, C hidden size, G groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultrathink.model.experts.sequences import Sequences


class GroupGates(nn.Module):
    """The projection ``[G, C]`` of a layer's input to the logits of its groups."""

    def __init__(self, num_groups: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_groups, hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """The logits ``[B, T, G]`` of states ``[B, T, C]``, in the precision of the states."""
        return F.linear(x, self.weight.to(x.dtype))


def group_weights(logits: Tensor) -> Tensor:
    """The weight of each group, 1 on average: ``[B, T, G]`` from logits of that shape.

    A path that leaves groups out does not change the weights of the others: what it costs is then
    what those groups contributed, and nothing else.
    """
    return logits.shape[-1] * logits.softmax(-1)


def group_loss(logits: Tensor, targets: Tensor, sequences: Sequences) -> Tensor:
    """How far the share of the weights that a token's own groups have is below what is taught.

    ``targets`` is boolean ``[B, T, G]``: the groups that a token belongs to. Tokens without any,
    and those that are not counted, add nothing. Zero-dimensional, in nats, summed over tokens.
    """
    every = logits.logsumexp(-1)
    has_any = targets.any(-1)
    # All groups in place of none, whose logarithm would have no gradient: its loss is 0.
    own = logits.masked_fill(~(targets | ~has_any[..., None]), -torch.inf).logsumexp(-1)
    enough = (1 + 2 * targets.to(every).mean(-1)) / 3
    return ((enough.log() + every - own).relu() * sequences.counted[..., 0]).sum()
