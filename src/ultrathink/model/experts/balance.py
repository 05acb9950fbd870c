"""Load balancing of the experts of a group: four losses and a bias.

Each loss is computed for each sequence and summed over its counted tokens, so that it does not
depend on which sequences share a batch. With p_t,i the router's probability of expert i for token
t, over all N experts of the group, P_i its mean over the sequence and f_i the share of the
sequence's assignments that went to i:

- load: ``N · Σ_i P_i f_i``, 1 at perfect balance (Switch, https://arxiv.org/abs/2101.03961, eq. 4);
- importance: the squared coefficient of variation of ``Σ_t p_t,i``, which is ``N · Σ_i P_i² - 1``
  (https://arxiv.org/abs/1701.06538, eq. 7);
- entropy: ``1 - H(p_t) / ln N``, 0 for a token that is spread evenly;
- z: ``(ln Σ_i exp logit_i)²`` (https://arxiv.org/abs/2202.08906, eq. 5).

Shapes: B rows of a batch, T tokens, n slots of a group, L layers, E slots of all groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ultrathink.model.experts.sequences import Sequences

LOSSES = ("load", "importance", "entropy", "z")


class GroupScores(NamedTuple):
    """The router's scores of each token, for one group."""

    scores: Tensor
    """``[B, T, n]``: the source of the gates."""

    probabilities: Tensor
    """``[B, T, n]``: a distribution over the group."""

    log_partition: Tensor
    """``[B, T, 1]``: of the logits."""

    chosen: Tensor = torch.empty(0)
    """``[B, T, n]``: 1 for the experts that a token chose, else 0."""

    def entropy(self) -> Tensor:
        """``[B, T]``: of each token's distribution, in nats."""
        is_zero = self.probabilities == 0
        logs = torch.where(is_zero, 1.0, self.probabilities).log()
        return -(self.probabilities * logs).sum(-1)


def group_losses(
    scores: GroupScores, sequences: Sequences, num_active: Tensor, top_k: int
) -> Tensor:
    """The four losses of one group ``[4]``, in the order of ``LOSSES``, unweighted.

    ``num_active`` is N, the experts without empty slots.
    """
    mean = sequences.mean(scores.probabilities)  # [B, S, n]
    share = sequences.mean(scores.chosen) / top_k
    load = num_active * (mean * share).sum(-1, keepdim=True)
    importance = num_active * mean.square().sum(-1, keepdim=True) - 1
    largest = num_active.log()
    narrowness = (largest - scores.entropy()[..., None]) / largest.clamp(min=1e-6)
    each = (load, importance, narrowness, scores.log_partition.square())
    return torch.cat([sequences.total(values) for values in each])


@torch.no_grad()
def move_bias(bias: Tensor, load: Tensor, active: Tensor, rate: Tensor) -> None:
    """Raise the bias of a group's experts with less than the mean load, lower that of others.

    ``bias`` and ``load`` (tokens of a whole step) are ``[n]``; empty slots keep theirs. The bias is
    in units of logits. https://arxiv.org/abs/2408.15664, algorithm 1
    """
    load = load.to(bias)
    mean = load.sum() / active.sum()
    bias += torch.where(active, (mean - load).sign(), 0.0) * rate.to(bias)
