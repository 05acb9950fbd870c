"""The router of a layer that tokens may pass by. https://arxiv.org/abs/2404.02258

In training the tokens with the highest scores of each sequence go through, and the result is
weighted by a gate, so that the router learns. In evaluation later tokens are not known: a small
predictor of that choice decides from the token's own state, so that neither the batch nor the
length changes a decision, and a token that is decoded alone can be skipped.

The score is the product of the normalized state and a row of weights whose norm counts as 1 at
most. So a score never exceeds √C in size, whatever the weights become, and is of the order of 1;
the gate ``2 · sigmoid(score)`` lies between 0 and 2 and keeps a gradient. Weights start at zero:
every gate is 1, and a chosen token gets what it would get from a layer without routing.

Shapes: B rows of a batch, T tokens, C hidden size, H hidden size of the predictor, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultrathink.config.depth import EIGHTHS, ModConfig, eighths_of
from ultrathink.model.compute_path import ComputePath
from ultrathink.model.depth.controls import DepthControls
from ultrathink.model.depth.rows import choose_tokens, rows_for, shares_of
from ultrathink.model.experts.sequences import Sequences

WIDEST = 2.5  # standard deviations of the logits between their mean and a threshold
_PRIME = (1 << 31) - 1  # products of two smaller numbers fit into 64 bits


class DepthPass(NamedTuple):
    """What the choice depends on in a forward pass, beside the states."""

    sequences: Sequences
    eighths: int
    """The capacity."""
    is_trained: bool
    """Whether this is the capacity of training: others are not reported and train no predictor."""
    places: Tensor
    """int64 ``[B, T]``: positions within the sequences."""
    input_ids: Tensor | None
    """int64 ``[B, T]``, on which random choices in training depend; not known of tokens that only
    a cache holds."""
    step: Tensor
    """Zero-dimensional, int64."""


def depth_pass(
    controls: DepthControls,
    path: ComputePath,
    sequences: Sequences,
    input_ids: Tensor | None = None,
    starts: SequenceOf[int] = (0,),
) -> DepthPass:
    """A pass of ``sequences`` through ``path``; their rows begin at the positions ``starts``."""
    B, T, _ = sequences.counted.shape
    device = sequences.counted.device
    places = torch.arange(T, device=device).expand(B, T)
    if sequences.bounds is not None:
        places = places - sequences.bounds[0]
    if any(starts):
        places = places + torch.tensor(starts, device=device)[:, None]
    eighths = controls.eighths if path.depth is None else eighths_of(path.depth)
    return DepthPass(sequences, eighths, path.depth is None, places, input_ids, controls.step)


class Decision(NamedTuple):
    """Which tokens go through the layer, and what their results are multiplied by."""

    chosen: Tensor
    """Boolean ``[B, T]``."""

    gates: Tensor | None
    """``[B, T, 1]``: 0 for tokens that pass by; None: 1 for those that are chosen."""

    num_rows: int
    """In training, the rows that hold the chosen tokens of any row of the batch."""

    report: LayerDepth | None


class LayerDepth(NamedTuple):
    """Statistics of a layer, summed over counted tokens; only ``loss`` has a gradient."""

    loss: Tensor | None
    """The weighted cross-entropy of the predictor, in nats; None without one."""

    chosen: Tensor
    """``[B, T]``: 1 for counted tokens that go through, else 0."""

    selected: Tensor
    """Tokens that go through the layer."""

    score: Tensor
    """Their scores."""

    gate: Tensor
    """Their gates."""

    logits: Tensor
    """``[11]``: of the predictor's logits the number at or above each of the eight thresholds, the
    sum, and the sum of squares; and the number of tokens."""

    hits: Tensor
    """Chosen tokens that the predictor would choose."""

    by_place: Tensor
    """``[T]``: chosen tokens at each position of a sequence."""


class DepthRouter(nn.Module):
    """Chooses the tokens of one layer.

    The buffer ``thresholds`` ``[8]`` has the predictor's threshold for each capacity, in eighths.
    """

    thresholds: Tensor
    salt: Tensor

    def __init__(self, config: ModConfig, hidden_size: int, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.is_learned = config.strategy == "learned"
        self.router: nn.Module | None = None
        self.predictor: Predictor | None = None
        if self.is_learned:
            self.router = Router(hidden_size)
            assert config.predictor.hidden_size is not None, "the configuration is resolved first"
            self.predictor = Predictor(hidden_size, config.predictor.hidden_size)
            self.register_buffer("thresholds", torch.zeros(EIGHTHS))
        # A tensor, because a number would compile the block of each layer again.
        self.register_buffer("salt", torch.tensor(layer), persistent=False)

    def reset_buffers(self) -> None:
        """Let every token pass the predictor, as at the start of a training."""
        self.salt.fill_(self.layer)
        if self.is_learned:
            self.thresholds.zero_()

    def forward(self, x: Tensor, depth: DepthPass) -> Decision:
        """Choose among the tokens with the normalized states ``x`` ``[B, T, C]``."""
        if self.router is not None and self.predictor is not None:
            return self._learned(x, depth, self.router, self.predictor)
        if self.config.strategy == "fixed":
            places, eighths = depth.places, depth.eighths
            chosen = (places + 1) * eighths // EIGHTHS > places * eighths // EIGHTHS
            return self._without_router(chosen, depth)
        draws = _draws(depth, self.salt, depth.step if self.training else None)
        if not self.training:
            return self._without_router(draws < _PRIME * depth.eighths // EIGHTHS, depth)
        return self._without_router(best_tokens(draws.to(torch.float32), depth), depth)

    def _learned(
        self, x: Tensor, depth: DepthPass, router: nn.Module, predictor: nn.Module
    ) -> Decision:
        states = _normalized(x)
        scores = router(states)  # [B, T, 1]
        logits = predictor(states, scores)[..., 0]
        if depth.eighths == EIGHTHS:
            chosen = torch.ones_like(logits, dtype=torch.bool)
        elif self.training:
            chosen = best_tokens(scores[..., 0], depth)
        else:
            chosen = logits >= self.thresholds[depth.eighths - 1].to(logits)
        gates = 2 * scores.sigmoid()
        report = None
        if depth.is_trained and self.training:
            report = self._report(chosen, scores, gates, logits, depth)
        gates = gates * chosen[..., None].to(gates)
        return Decision(chosen, gates, rows_for(chosen, depth.eighths), report)

    def _report(
        self, chosen: Tensor, scores: Tensor, gates: Tensor, logits: Tensor, depth: DepthPass
    ) -> LayerDepth:
        counted = depth.sequences.counted[..., 0]  # [B, T]
        mine = chosen.to(counted) * counted
        losses = F.binary_cross_entropy_with_logits(logits, chosen.to(logits), reduction="none")
        logits = logits.detach()
        positive = (logits[..., None] >= self.thresholds.to(logits)).to(counted)  # [B, T, 8]
        sums = [positive, *(values[..., None] for values in (logits, logits.square()))]
        sums.append(torch.ones_like(sums[-1]))
        # Where all tokens go through there is nothing to predict.
        weight = self.config.predictor.weight if depth.eighths < EIGHTHS else 0.0
        return LayerDepth(
            loss=(losses * counted).sum() * weight,
            chosen=mine,
            selected=mine.sum(),
            score=(scores.detach()[..., 0] * mine).sum(),
            gate=(gates.detach()[..., 0] * mine).sum(),
            logits=(torch.cat(sums, -1) * counted[..., None]).sum((0, 1)),
            hits=(positive[..., depth.eighths - 1] * mine).sum(),
            by_place=by_place(mine, depth),
        )

    def _without_router(self, chosen: Tensor, depth: DepthPass) -> Decision:
        report = None
        if depth.is_trained and self.training:
            counted = depth.sequences.counted[..., 0]
            mine = chosen.to(counted) * counted
            zero, total = mine.new_zeros(()), mine.sum()
            none = mine.new_zeros(EIGHTHS + 3)
            where = by_place(mine, depth)
            report = LayerDepth(None, mine, total, zero, total, none, zero, where)
        return Decision(chosen, None, rows_for(chosen, depth.eighths), report)

    @torch.no_grad()
    def move_thresholds(self, logits: Tensor) -> None:
        """Adjust the thresholds after an update, so that their shares of positives become those of
        the capacities.

        ``logits`` ``[11]`` is that of ``LayerDepth`` for the whole step. A threshold stays near the
        logits, so that it finds back from anywhere.
        """
        positive, (total, squares, count) = logits[:EIGHTHS], logits[EIGHTHS:]
        count = count.clamp(min=1)
        mean = total / count
        deviation = (squares / count - mean.square()).clamp(min=0).sqrt()
        wanted = torch.arange(1, EIGHTHS + 1, device=logits.device) / EIGHTHS
        rate = self.config.predictor.threshold_rate
        moved = self.thresholds.to(logits) + rate * deviation * (positive / count - wanted)
        low, high = mean - WIDEST * deviation, mean + WIDEST * deviation
        self.thresholds.copy_(torch.minimum(torch.maximum(moved, low), high))


class Router(nn.Module):
    """The weights ``[1, C]`` of the score."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, hidden_size))

    def forward(self, states: Tensor) -> Tensor:
        """The score ``[B, T, 1]`` of states ``[B, T, C]`` with a mean square of 1."""
        weight = self.weight.to(states)
        return F.linear(states, weight / weight.square().sum().clamp(min=1).sqrt())


class Predictor(nn.Module):
    """Predicts whether a token is chosen, from its state and its score.

    The logit is ``scale · score + outer(silu(inner(state))) + bias``; ``outer`` starts at zero, so
    that it begins with the order of the scores. Nothing but the predictor has a gradient from it.
    """

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.empty(width, hidden_size))
        self.outer = nn.Parameter(torch.empty(1, width))
        self.scale = nn.Parameter(torch.empty(1))
        self.bias = nn.Parameter(torch.empty(1))

    def forward(self, states: Tensor, scores: Tensor) -> Tensor:
        """The logit ``[B, T, 1]`` of states ``[B, T, C]`` with ``scores`` ``[B, T, 1]``."""
        hidden = F.silu(F.linear(states.detach(), self.inner.to(states)))
        own = F.linear(hidden, self.outer.to(states))
        return self.scale.to(states) * scores.detach() + own + self.bias.to(states)


def _normalized(x: Tensor) -> Tensor:
    """``x`` with a mean square of 1 along its last dimension, in at least float32."""
    precise = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.rms_norm(precise, precise.shape[-1:], eps=1e-6)


def best_tokens(scores: Tensor, depth: DepthPass) -> Tensor:
    """The tokens with the highest ``scores`` ``[B, T]`` of each sequence, boolean ``[B, T]``."""
    shares = shares_of(depth.sequences, depth.eighths)
    ranked = torch.where(shares.real, scores.detach(), -torch.inf)
    first = None if depth.sequences.bounds is None else depth.sequences.bounds[0]
    return choose_tokens(ranked, depth.places, first, shares.limits)


def _draws(depth: DepthPass, salt: Tensor, step: Tensor | None) -> Tensor:
    """A pseudorandom number from 0 to ``_PRIME - 1`` for each token, int64 ``[B, T]``.

    It follows from its position and the layer, in training also from the token and the step. So it
    is the same in any batch, on any process, and when it is computed again.
    """
    drawn = torch.ones_like(depth.places)
    own = [depth.places, salt]
    if step is not None:
        assert depth.input_ids is not None, "a cache is not trained with"
        own += [depth.input_ids, step]
    for mixed in own:
        drawn = (drawn * 0x27D4EB2D + mixed) % _PRIME
        drawn = (drawn ^ (drawn >> 15)) % _PRIME
    return drawn * 0x165667B1 % _PRIME


def by_place(values: Tensor, depth: DepthPass) -> Tensor:
    """Sums ``[T]`` of ``values`` ``[B, T]`` at each position of a sequence."""
    if depth.sequences.bounds is None:
        return values.sum(0)
    places = depth.places.clamp(max=values.shape[1] - 1)
    zeros = values.new_zeros(values.shape[1])
    return zeros.index_add(0, places.flatten(), values.flatten())
