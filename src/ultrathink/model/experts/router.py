"""The router: chooses the experts of each token, and their weights.

One projection gives the logits of all groups; each group is a slice of them, with its own softmax
(or sigmoid) and its own top-k. https://arxiv.org/abs/1701.06538, https://arxiv.org/abs/2101.03961

Shapes: B rows of a batch, T tokens, C hidden size, E slots for experts of all groups, G groups,
K experts of a token over all groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultrathink.config.experts import ExpertGroupConfig, MoeConfig
from ultrathink.model.experts.balance import GroupScores, group_losses, move_bias
from ultrathink.model.experts.controls import Controls
from ultrathink.model.experts.noise import uniform_noise, within_capacity
from ultrathink.model.experts.sequences import Sequences


class LayerRouting(NamedTuple):
    """Routing statistics of a layer, summed over counted tokens; only ``losses`` have a
    gradient."""

    losses: Tensor
    """``[4]``: the weighted auxiliary losses, in the order of ``balance.LOSSES``."""

    load: Tensor
    """``[E]``: tokens that chose each expert."""

    dropped: Tensor
    """``[E]``: those of them that exceeded its capacity."""

    probability: Tensor
    """``[E]``: the router's probabilities, over all experts of a group."""

    entropy: Tensor
    """``[G]``: of a token's distribution over a group, in nats."""

    confidence: Tensor
    """``[G]``: a token's largest probability in a group."""


class Choice(NamedTuple):
    """The experts of each token."""

    experts: Tensor
    """int64 ``[B * T, K]``, counted over all groups; E for a dropped assignment."""

    gates: Tensor
    """``[B * T, K]``: the factor of each expert's output, 0 for a dropped assignment."""


class Router(nn.Module):
    """The projection ``[E, C]``, with buffers for each expert.

    ``selection_bias`` ``[E]`` is added to the logits that choose experts, but not to their gates
    (https://arxiv.org/abs/2408.15664). ``active`` ``[E]`` is false for empty slots.
    """

    def __init__(self, config: MoeConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_slots, hidden_size))
        self.register_buffer("selection_bias", torch.zeros(config.num_slots))
        self.register_buffer("active", torch.ones(config.num_slots, dtype=torch.bool))
        self.selection_bias: Tensor
        self.active: Tensor

    def reset_buffers(self) -> None:
        """Reset the biases, and activate the configured number of experts in each group."""
        self.selection_bias.zero_()
        for group, slots in self.groups():
            self.active[slots] = False
            self.active[slots.start : slots.start + group.num_experts] = True

    def move_bias(self, load: Tensor, rate: Tensor) -> None:
        """Adjust the biases to balance the ``load`` ``[E]`` of a whole step, group by group."""
        for _, slots in self.groups():
            move_bias(self.selection_bias[slots], load[slots], self.active[slots], rate)

    def groups(self) -> list[tuple[ExpertGroupConfig, slice]]:
        """Each group and its slots."""
        found, start = [], 0
        for group in self.config.groups:
            found.append((group, slice(start, start + group.num_slots)))
            start += group.num_slots
        return found

    def forward(
        self, x: Tensor, sequences: Sequences, controls: Controls
    ) -> tuple[Choice, LayerRouting]:
        """Choose the experts of each token of ``[B, T, C]``, in at least float32."""
        precise = torch.promote_types(x.dtype, torch.float32)
        read = x.to(precise)
        if self.training:
            read = read * (1 + uniform_noise(read, controls.jitter))
        logits = F.linear(read, self.weight.to(precise))  # [B, T, E]
        logits = logits * (controls.warmup / controls.temperature).to(logits)
        logits = logits.masked_fill(~self.active, -torch.inf)
        wanted = self._wanted(logits.detach(), controls)
        scores: list[GroupScores] = []
        experts: list[Tensor] = []
        gates: list[Tensor] = []
        for group, slots in self.groups():
            group_scores = self._scores(logits[..., slots])
            chosen, is_chosen = _top(wanted[..., slots], group.top_k)
            one_hot = is_chosen.to(precise)  # [B, T, k, n]
            gate = (one_hot * group_scores.scores[..., None, :]).sum(-1)  # [B, T, k]
            if self.config.normalize_gates and group.top_k > 1:
                gate = gate / gate.sum(-1, keepdim=True).clamp(min=torch.finfo(precise).tiny)
            scores.append(group_scores._replace(chosen=one_hot.sum(-2)))
            experts.append(chosen + slots.start)
            gates.append(gate * self.config.gate_scale)
        choice = Choice(torch.cat(experts, -1), torch.cat(gates, -1))
        chosen_slots = kept = torch.cat([group.chosen for group in scores], -1)
        if self.training:
            kept = self._within_capacity(scores, chosen_slots, sequences, controls)
            is_kept = kept.gather(-1, choice.experts)  # [B, T, K]
            choice = Choice(
                torch.where(is_kept, choice.experts, self.config.num_slots),
                torch.where(is_kept, choice.gates, 0.0),
            )
        routing = self._report(scores, chosen_slots, kept.to(precise), sequences, controls)
        return Choice(*(part.flatten(0, 1) for part in choice)), routing

    def _wanted(self, logits: Tensor, controls: Controls) -> Tensor:
        """The values that decide the choice, ``[B, T, E]``: logits, bias, and in training noise."""
        wanted = logits + self.selection_bias.to(logits)
        if not self.training:
            return wanted
        one = wanted[:, :1].clone()
        dropout = controls.expert_dropout
        # Random numbers in -1..1 if experts are dropped, else 0, which exceeds every limit here.
        draw = uniform_noise(one, (dropout > 0).to(dropout))
        is_closed = (draw < 2 * dropout.to(draw) - 1) & (dropout > 0)
        # Far below every open expert, but above empty slots: all of a group may be closed.
        wanted = torch.where(is_closed, wanted - 1e4, wanted)
        return wanted + uniform_noise(wanted, 1 - controls.warmup)

    def _scores(self, logits: Tensor) -> GroupScores:
        """Scores and probabilities of one group's ``logits`` ``[B, T, n]``."""
        log_partition = logits.logsumexp(-1, keepdim=True)
        if self.config.score == "softmax":
            probabilities = (logits - log_partition).exp()
            return GroupScores(probabilities, probabilities, log_partition)
        logs = F.logsigmoid(logits)  # has a ratio and a gradient even if all scores underflow
        probabilities = (logs - logs.logsumexp(-1, keepdim=True)).exp()
        return GroupScores(logs.exp(), probabilities, log_partition)

    def _within_capacity(
        self,
        scores: list[GroupScores],
        chosen: Tensor,
        sequences: Sequences,
        controls: Controls,
    ) -> Tensor:
        """Which tokens each expert takes, boolean ``[B, T, E]``."""
        # Untrained tokens are dropped first; of these the last ones of a sequence, such as padding.
        rank = torch.cat([group.scores for group in scores], -1)
        rank = torch.where(sequences.counted.bool(), rank, -1.0)
        shares = torch.cat(
            [
                sequences.num_counted
                * (group.top_k / self.active[slots].sum()).expand(group.num_slots)
                for group, slots in self.groups()
            ],
            -1,
        )
        first = sequences.first
        return within_capacity(rank, chosen.bool(), first, shares, controls.capacity_factor)

    def _report(
        self,
        scores: list[GroupScores],
        chosen: Tensor,
        kept: Tensor,
        sequences: Sequences,
        controls: Controls,
    ) -> LayerRouting:
        losses = torch.zeros(4, dtype=kept.dtype, device=kept.device)
        for (group, slots), group_scores in zip(self.groups(), scores, strict=True):
            num_active = self.active[slots].sum().to(kept)
            losses = losses + group_losses(group_scores, sequences, num_active, group.top_k)
        weights = torch.stack([controls.load, controls.importance, controls.entropy, controls.z])
        probabilities = torch.cat([group.probabilities for group in scores], -1).detach()
        entropies = torch.stack([group.entropy().detach() for group in scores], -1)
        largest = torch.stack([group.probabilities.detach().amax(-1) for group in scores], -1)
        return LayerRouting(
            losses=losses * weights.to(losses),
            load=sequences.total(chosen),
            dropped=sequences.total(chosen - kept),
            probability=sequences.total(probabilities),
            entropy=sequences.total(entropies),
            confidence=sequences.total(largest),
        )


def _top(wanted: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The ``top_k`` largest of ``[B, T, n]``: indices ``[B, T, k]`` and a mask ``[B, T, k, n]``.

    For a few of many, on a CPU, repeatedly taking the largest is much faster than ``topk``.
    """
    slots = torch.arange(wanted.shape[-1], device=wanted.device)
    indices, masks = [], []
    for _ in range(top_k):
        index = wanted.max(-1, keepdim=True).indices
        mask = slots == index
        wanted = wanted.masked_fill(mask, -torch.inf)
        indices.append(index)
        masks.append(mask)
    return torch.cat(indices, -1), torch.stack(masks, -2)
