"""The tokens that go through a layer, gathered into rows of a smaller batch.

The chosen tokens of a sequence come first, in their order; the rows that are left over hold other
tokens, whose results are not used. Causality over rows hides those from the chosen ones.

Shapes: B rows of a batch, T tokens, R rows of chosen tokens, C hidden size, X any size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ultrathink.config.depth import EIGHTHS
from ultrathink.model.attention_mask import AttentionMask
from ultrathink.model.experts.sequences import Sequences


class Rows(NamedTuple):
    """Which token is in each row, and the reverse."""

    tokens: Tensor
    """int64 ``[B, R]``: the token in each row; no token is in two."""

    place: Tensor
    """int64 ``[B, T]``: the row of each token; R for one that is in none."""

    chosen: Tensor
    """Boolean ``[B, T]``: the tokens that go through the layer."""

    def gather(self, values: Tensor) -> Tensor:
        """``[B, R, X]`` of ``values`` ``[B, T, X]``."""
        gathered: Tensor = _Take.apply(values, self.tokens, self.place)  # type: ignore[no-untyped-call]
        return gathered

    def scatter(self, rows: Tensor) -> Tensor:
        """``[B, T, X]`` of ``rows`` ``[B, R, X]``; zero for tokens that are in none."""
        scattered: Tensor = _Take.apply(rows, self.place, self.tokens)  # type: ignore[no-untyped-call]
        return scattered


class _Take(torch.autograd.Function):
    """``values[b, index[b, m]]``, zero where the index is N; ``[B, N, X]`` to ``[B, M, X]``.

    ``inverse`` ``[B, N]`` is the place of each value, M if it is not taken. So the gradient is a
    gather too, in the same order in every run.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(index, inverse)
        return _taken(values, index)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        _, inverse = ctx.saved_tensors
        return _taken(grad_outputs[0], inverse), None, None


def _taken(values: Tensor, index: Tensor) -> Tensor:
    num_values = values.shape[1]
    if num_values == 0:
        return values.new_zeros(*index.shape, values.shape[2])
    begins = torch.arange(0, values.shape[0] * num_values, num_values, device=index.device)
    flat = (index.clamp(max=num_values - 1) + begins[:, None]).flatten()
    taken = values.flatten(0, 1).index_select(0, flat).view(*index.shape, -1)
    return torch.where((index < num_values)[..., None], taken, 0.0)


def rows_of(chosen: Tensor, num_rows: int) -> Rows:
    """The rows of the tokens ``chosen`` (boolean ``[B, T]``), at most ``num_rows`` of each row."""
    B, T = chosen.shape
    is_chosen = chosen.to(torch.int64)
    total = is_chosen.sum(1, keepdim=True)
    before = is_chosen.cumsum(1) - is_chosen  # chosen ones before each token
    steps = torch.arange(T, device=chosen.device).expand(B, T)
    place = torch.where(chosen, before, total + steps - before).clamp(max=num_rows)
    # One place more, for all tokens that are in no row.
    tokens = torch.empty(B, num_rows + 1, dtype=torch.int64, device=chosen.device)
    tokens = tokens.scatter(1, place, steps)[:, :num_rows]
    return Rows(tokens, place, chosen)


# One custom operator: its parts compile to slow code, and recomputation must not choose again.
@torch.library.custom_op("ultrathink::choose_tokens", mutates_args=())
def _choose_tokens(scores: Tensor, places: Tensor, first: Tensor | None, limits: Tensor) -> Tensor:
    # Equal scores, as those of a router that is all zeros, are spread over the sequence: in the
    # order of the fractional parts of multiples of the golden ratio.
    spread = (places * 0x9E3779B1) % (1 << 32)
    order = spread.argsort(dim=1, stable=True)
    order = order.gather(1, scores.gather(1, order).argsort(dim=1, descending=True, stable=True))
    if first is not None:
        begins = first.gather(1, order)
        order = order.gather(1, begins.argsort(dim=1, stable=True))  # by rank in each sequence
    steps = torch.arange(order.shape[1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, steps)
    return rank < limits if first is None else rank - first < limits


@_choose_tokens.register_fake
def _(scores: Tensor, places: Tensor, first: Tensor | None, limits: Tensor) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


def choose_tokens(scores: Tensor, places: Tensor, first: Tensor | None, limits: Tensor) -> Tensor:
    """The tokens of each sequence with the highest ``scores``, boolean ``[B, T]``.

    int64 ``[B, T]``: ``places`` within the sequence, ``first`` the first token of it in its row
    (None: rows are sequences), ``limits`` how many of it are chosen. Tokens of a score of -inf come
    last.
    """
    chosen: Tensor = _choose_tokens(scores.detach(), places, first, limits)
    return chosen


class Shares(NamedTuple):
    """How many tokens of each sequence may go through a layer in training."""

    real: Tensor
    """Boolean ``[B, T]``: false for what follows the last counted token of a sequence, such as
    padding: it can change no loss, and takes nobody's place."""

    limits: Tensor
    """int64 ``[B, T]``: the chosen tokens of each token's sequence."""


def rows_for(tokens: Tensor, eighths: int) -> int:
    """R: the rows that hold the chosen ones of ``tokens`` ``[B, T, ...]``, ⌈capacity · T⌉."""
    return -(-tokens.shape[1] * eighths // EIGHTHS)


def shares_of(sequences: Sequences, eighths: int) -> Shares:
    """The shares of each sequence at a capacity in ``eighths``.

    ⌈capacity · n⌉ of a row with n tokens. Of isolated documents ⌊capacity · n⌋: together these are
    never more than ⌈capacity · T⌉, so that no document's share depends on its neighbours.
    """
    counted = sequences.counted[..., 0] > 0
    B, T = counted.shape
    steps = torch.arange(T, device=counted.device).expand(B, T)
    last = torch.where(counted, steps + 1, 0).cummax(1).values  # after the last counted one so far
    if sequences.bounds is None:
        end = last[:, -1:].expand(B, T)
        limits = -(-end * eighths // EIGHTHS)
    else:
        first, after = sequences.bounds
        end = last.gather(1, after - 1)
        limits = (end - first).clamp(min=0) * eighths // EIGHTHS
    return Shares(steps < end, limits)


def sequences_of_rows(sequences: Sequences, rows: Rows) -> Sequences:
    """``sequences`` as the rows see them: only chosen tokens count."""
    num_rows = rows.tokens.shape[1]
    mine = sequences.counted * rows.chosen[..., None].to(sequences.counted)  # [B, T, 1]
    counted = mine.gather(1, rows.tokens[..., None])
    if sequences.bounds is None:
        total = counted.sum(1, keepdim=True).clamp(min=1)
        return Sequences(counted, None, total)
    before = F.pad(rows.chosen.to(torch.int64).cumsum(1), (1, 0))  # [B, T + 1]
    sums = F.pad(mine[..., 0].cumsum(1), (1, 0))
    begin, end = (bound.gather(1, rows.tokens) for bound in sequences.bounds)
    # Rows that are left over are a sequence of their own, after all others.
    total = before[:, -1:]
    is_used = torch.arange(num_rows, device=total.device) < total
    first = torch.where(is_used, before.gather(1, begin), total)
    after = before.gather(1, end)
    num_counted = sums.gather(1, end) - sums.gather(1, begin)
    return Sequences(counted, (first, after), num_counted.clamp(min=1)[..., None])


def angles_of_rows(cos_sin: Tensor, rows: Rows) -> Tensor:
    """The rotary angles ``[2, B, 1, R, D / 2]`` of the tokens in the rows, at their positions."""
    B, num_rows = rows.tokens.shape
    size = cos_sin.shape[-1]
    index = rows.tokens[None, :, None, :, None].expand(2, B, 1, num_rows, size)
    return cos_sin.expand(2, B, 1, -1, size).gather(3, index)


def mask_of_rows(mask: AttentionMask | None, rows: Rows) -> AttentionMask | None:
    """What a token in a row may see of the others; None if causality over rows is sufficient."""
    if mask is None:
        return None
    if mask.dense is None:
        assert mask.document_ids is not None, "a mask has a part"
        return AttentionMask(document_ids=mask.document_ids.gather(1, rows.tokens))
    B, num_rows = rows.tokens.shape
    heads = mask.dense.shape[1]
    queries = rows.tokens[:, None, :, None].expand(B, heads, num_rows, mask.dense.shape[3])
    keys = rows.tokens[:, None, None, :].expand(B, heads, num_rows, num_rows)
    dense = mask.dense.expand(B, -1, -1, -1).gather(2, queries).gather(3, keys)
    seen = torch.ones(num_rows, num_rows, dtype=torch.bool, device=dense.device).tril()
    if dense.dtype == torch.bool:
        dense = dense & seen
        blank = ~dense.any(-1, keepdim=True)
        return AttentionMask(dense=dense | blank, blank_rows=blank)
    dense = dense.masked_fill(~seen, float("-inf"))
    blank = (dense == float("-inf")).all(-1, keepdim=True)
    return AttentionMask(dense=dense.masked_fill(blank, 0.0), blank_rows=blank)
