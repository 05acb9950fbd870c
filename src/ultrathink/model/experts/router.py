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
from ultrathink.model.compute_path import ComputePath
from ultrathink.model.experts.balance import GroupScores, group_losses, move_bias
from ultrathink.model.experts.controls import Controls
from ultrathink.model.experts.group_gates import GroupGates, group_loss, group_weights
from ultrathink.model.experts.noise import uniform_noise, within_capacity
from ultrathink.model.experts.sequences import Sequences
from ultrathink.model.experts.splits import parts_of


class RoutingPass(NamedTuple):
    """What routing depends on in a forward pass, beside the states."""

    sequences: Sequences
    controls: Controls
    path: ComputePath
    """Resolved: with the names of the groups that run."""
    group_targets: Tensor | None = None
    """Boolean ``[B, T, G]``: the groups that each token belongs to, if that is taught."""

    width: Tensor | None = None
    """``[B]``: share of the experts of a path that a row's tokens are sent to; None: all."""

    has_splits: bool = False
    """Whether an expert of any layer is split (``splits.py``)."""


class RunningGroup(NamedTuple):
    """A group that runs in a pass."""

    config: ExpertGroupConfig
    slots: slice
    """Of the layer's slots."""
    columns: slice
    """Of the slots of all groups that run, which follow each other."""
    top_k: int
    """Experts of a token."""


class LayerRouting(NamedTuple):
    """Routing statistics of a layer, summed over counted tokens; only losses have a gradient."""

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

    group_weight: Tensor | None = None
    """``[G]``: the weight of each group, with group gates."""

    group_loss: Tensor | None = None
    """Zero-dimensional: the weighted loss of the group gates, if they have targets."""

    def observed(self) -> list[str]:
        """The names of the statistics that there are, without the losses."""
        is_loss = {"losses", "group_loss"}
        return [
            name
            for name, value in self._asdict().items()
            if name not in is_loss and value is not None
        ]


class Choice(NamedTuple):
    """The experts of each token."""

    experts: Tensor
    """int64 ``[B * T, K]``, counted over all groups that run; their number of slots, E, for a
    dropped assignment."""

    gates: Tensor
    """``[B * T, K]``: the factor of each expert's output, 0 for a dropped assignment."""


class Router(nn.Module):
    """The projection ``[E, C]``, with buffers for each expert.

    ``selection_bias`` ``[E]`` is added to the logits that choose experts, but not to their gates
    (https://arxiv.org/abs/2408.15664). ``active`` ``[E]`` is false for empty slots. ``side``
    ``[E, C + 1]`` and ``branch`` ``[E, E]`` describe the experts that were split (``splits.py``).
    """

    def __init__(self, config: MoeConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_slots, hidden_size))
        self.group_gates: GroupGates | None = None
        if config.group_gates:
            self.group_gates = GroupGates(len(config.groups), hidden_size)
        self.register_buffer("selection_bias", torch.zeros(config.num_slots))
        self.register_buffer("active", torch.ones(config.num_slots, dtype=torch.bool))
        self.register_buffer("side", torch.zeros(config.num_slots, hidden_size + 1))
        branch = torch.zeros(config.num_slots, config.num_slots, dtype=torch.int8)
        self.register_buffer("branch", branch)
        self.selection_bias: Tensor
        self.active: Tensor
        self.side: Tensor
        self.branch: Tensor

    def reset_buffers(self) -> None:
        """Reset the biases, activate the configured number of experts in each group, none split."""
        for buffer in (self.selection_bias, self.side, self.branch):
            buffer.zero_()
        for group, slots in self.groups():
            self.active[slots] = False
            self.active[slots.start : slots.start + group.num_experts] = True

    def move_bias(self, load: Tensor, rate: Tensor) -> None:
        """Adjust the biases to balance the ``load`` ``[E]`` of a whole step, group by group."""
        for _, slots in self.groups():
            move_bias(self.selection_bias[slots], load[slots], self.active[slots], rate)

    def groups(self) -> list[tuple[ExpertGroupConfig, slice]]:
        """Each group and its slots."""
        return [(group.config, group.slots) for group in running_groups(self.config)]

    def forward(self, x: Tensor, routing: RoutingPass) -> tuple[Choice, LayerRouting | None]:
        """Choose the experts of each token of ``[B, T, C]``, in at least float32.

        Statistics are those of the model as it is trained: None if groups are left out, or if the
        path has another number of experts.
        """
        sequences, controls, path, group_targets, width, has_splits = routing
        running = running_groups(self.config, path)
        precise = torch.promote_types(x.dtype, torch.float32)
        read = x.to(precise)
        group_logits = None if self.group_gates is None else self.group_gates(read)
        if self.training:
            read = read * (1 + uniform_noise(read, controls.jitter))
        weight, bias, active = (
            of_groups(each, running) for each in (self.weight, self.selection_bias, self.active)
        )
        logits = F.linear(read, weight.to(precise))  # [B, T, E]
        logits = logits * (controls.warmup / controls.temperature).to(logits)
        logits = logits.masked_fill(~active, -torch.inf)
        wanted = self._wanted(logits.detach(), bias, controls)
        weights = None if group_logits is None else group_weights(group_logits)  # [B, T, G]
        shares: Tensor | None = None
        counted = active  # the experts to choose from; all parts of one are one
        if has_splits:
            side, branch = (of_groups(each, running) for each in (self.side, self.branch))
            may_be, shares = parts_of(x.to(precise), side, of_groups(branch.T, running).T)
            wanted = wanted.masked_fill(~may_be, -torch.inf)
            counted = active * shares
        scores: list[GroupScores] = []
        experts: list[Tensor] = []
        gates: list[Tensor] = []
        for group in running:
            share = None if shares is None else shares[group.columns]
            group_scores = self._scores(logits[..., group.columns], share)
            chosen, gate, one_hot = self._choose(wanted, group_scores.scores, group, counted)
            if weights is not None:
                gate = gate * weights[..., self.config.groups.index(group.config), None]
            factor = path.group_factors.get(group.config.name)
            if factor is not None:
                gate = gate * (factor.view(-1, 1, 1) if isinstance(factor, Tensor) else factor)
            if width is not None:
                most = (width.to(precise) * group.top_k).ceil().clamp(min=1)[:, None, None]
                is_used = torch.arange(group.top_k, device=x.device) < most  # [B, 1, k]
                one_hot = one_hot * is_used[..., None]
                gate = torch.where(is_used, gate, 0.0)
                chosen = torch.where(is_used, chosen, len(active))
            scores.append(group_scores._replace(chosen=one_hot.sum(-2)))
            experts.append(chosen)
            gates.append(gate * self.config.gate_scale)
        choice = Choice(torch.cat(experts, -1), torch.cat(gates, -1))
        chosen_slots = kept = torch.cat([group.chosen for group in scores], -1)
        if self.training:
            kept = self._within_capacity(scores, chosen_slots, running, active, sequences, controls)
            inside = choice.experts if width is None else choice.experts.clamp(max=len(active) - 1)
            is_kept = kept.gather(-1, inside)  # [B, T, K]
            choice = Choice(
                torch.where(is_kept, choice.experts, len(active)),
                torch.where(is_kept, choice.gates, 0.0),
            )
        report = None
        is_whole = len(running) == len(self.config.groups) and path.top_k == 1 and width is None
        if is_whole:
            report = self._report(scores, chosen_slots, kept.to(precise), sequences, controls)
            if group_logits is not None and weights is not None:
                report = report._replace(group_weight=sequences.total(weights.detach()))
                if self.group_gates is not None and group_targets is not None:
                    assert controls.groups is not None, "a model with group gates has this control"
                    # States are not bent to tell sources apart, which costs much of the loss.
                    taught = self.group_gates(x.detach().to(precise))
                    loss = group_loss(taught, group_targets, sequences)
                    report = report._replace(group_loss=loss * controls.groups.to(loss))
        return Choice(*(part.flatten(0, 1) for part in choice)), report

    def _choose(
        self, wanted: Tensor, scores: Tensor, group: RunningGroup, active: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The experts ``[B, T, k]`` of each token in one group, their gates, and a mask
        ``[B, T, k, n]``, from ``scores`` ``[B, T, n]``.

        Whether gates are normalized follows from the configured ``top_k``: a single expert that
        becomes two keeps its gate, and two that become one keep theirs, with its gradient.
        """
        is_normalized = self.config.normalize_gates and group.config.top_k > 1
        num_read = max(group.top_k, group.config.top_k) if is_normalized else group.top_k
        chosen, is_chosen = _top(wanted[..., group.columns], num_read)
        if num_read > group.config.top_k:  # there may be fewer experts
            is_there = torch.arange(num_read, device=active.device) < active[group.columns].sum()
            is_chosen = is_chosen & is_there[:, None]
        one_hot = is_chosen.to(scores.dtype)  # [B, T, k, n]
        gate = (one_hot * scores[..., None, :]).sum(-1)  # [B, T, k]
        if is_normalized:
            gate = gate / gate.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
        k = group.top_k
        return chosen[..., :k] + group.columns.start, gate[..., :k], one_hot[..., :k, :]

    def _wanted(self, logits: Tensor, bias: Tensor, controls: Controls) -> Tensor:
        """The values that decide the choice, ``[B, T, E]``: logits, bias, and in training noise."""
        wanted = logits + bias.to(logits)
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

    def _scores(self, logits: Tensor, shares: Tensor | None = None) -> GroupScores:
        """Scores and probabilities of one group's ``logits`` ``[B, T, n]``.

        The parts of a split expert, with ``shares`` ``[n]`` of it, have its score; its probability
        is divided among them.
        """
        log_partition = _log_partition(logits, shares)
        if self.config.score == "softmax":
            scores = probabilities = (logits - log_partition).exp()
        else:
            logs = F.logsigmoid(logits)  # has a ratio and a gradient even if all scores underflow
            probabilities = (logs - _log_partition(logs, shares)).exp()
            scores = logs.exp()
        if shares is not None:
            probabilities = probabilities * shares
        return GroupScores(scores, probabilities, log_partition)

    def _within_capacity(
        self,
        scores: list[GroupScores],
        chosen: Tensor,
        running: list[RunningGroup],
        active: Tensor,
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
                * (group.top_k / active[group.columns].sum()).expand(group.config.num_slots)
                for group in running
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


def running_groups(config: MoeConfig, path: ComputePath | None = None) -> list[RunningGroup]:
    """The groups that run on a resolved ``path``, in order; None: all, as configured."""
    path, found, start, column = path or ComputePath(), [], 0, 0
    for group in config.groups:
        slots = slice(start, start := start + group.num_slots)
        if path.groups is None or group.name in path.groups:
            top_k = min(max(1, round(path.top_k * group.top_k)), group.num_slots)
            columns = slice(column, column := column + group.num_slots)
            found.append(RunningGroup(group, slots, columns, top_k))
    return found


def of_groups(values: Tensor, running: list[RunningGroup]) -> Tensor:
    """The rows of ``values`` ``[E, ...]`` that belong to the groups that run."""
    slices: list[slice] = []
    for group in running:
        if slices and slices[-1].stop == group.slots.start:  # neighbours are one slice
            slices[-1] = slice(slices[-1].start, group.slots.stop)
        else:
            slices.append(group.slots)
    if slices == [slice(0, len(values))]:
        return values
    return values[slices[0]] if len(slices) == 1 else torch.cat([values[each] for each in slices])


def _log_partition(logs: Tensor, shares: Tensor | None) -> Tensor:
    """``ln Σ_i share_i · exp logs_i`` ``[B, T, 1]`` of ``logs`` ``[B, T, n]``.

    A split changes it by the order of the sum alone: its shares are powers of two.
    """
    if shares is None:
        return logs.logsumexp(-1, keepdim=True)
    largest = logs.detach().amax(-1, keepdim=True)
    return largest + ((logs - largest).exp() * shares).sum(-1, keepdim=True).log()


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
