"""The layout of a grouped product: the row of each assignment of a token to an expert.

Rows of one expert are consecutive, and padded with zeros to a round number, so that products have
few shapes. The last rows belong to no expert: they are zero too, and represent dropped
assignments.

Shapes: N tokens, K experts of a token, E slots for experts, R rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """The rows of ``N * K`` assignments; assignment ``n * K + k`` is the k-th of token n."""

    place: Tensor
    """int64 ``[N * K]``: the row of each assignment; R - 1, a row of zeros, if it was dropped."""

    source: Tensor
    """int64 ``[R]``: the assignment in each row; N * K if there is none."""

    ends: Tensor
    """int32 ``[E]``: the row after the last one of each expert, in the order of ``order``."""

    order: Tensor
    """int64 ``[E]``: the experts in the order of their rows."""


# With ``by_size`` rows are padded to a multiple of at least this share of their number.
COARSENESS = 8


def num_rows(num_assignments: int, num_experts: int, multiple: int, by_size: bool) -> int:
    """R: enough for the worst distribution over experts, plus one row that is always free."""
    rows = num_assignments + num_experts * (multiple - 1) + 1
    if by_size:
        rows += num_assignments // COARSENESS
    return -(-rows // multiple) * multiple


def _filled(counts: Tensor, multiple: int, by_size: bool) -> Tensor:
    """The padded number of rows of each expert, for ``counts`` used rows."""
    step: int | Tensor = multiple
    if by_size:  # an eighth of the power of two below
        exponents = torch.frexp(counts.double()).exponent.to(torch.int64) - 1
        step = (2 ** exponents.clamp(min=0) // COARSENESS).clamp(min=multiple)
    return (counts + step - 1) // step * step


# One custom operator, because compiling its parts makes them slower.
@torch.library.custom_op("ultrathink::expert_layout", mutates_args=())
def _layout(
    experts: Tensor, num_experts: int, multiple: int, by_size: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    flat, device = experts.flatten(), experts.device
    num_assignments = flat.numel()
    rows = num_rows(num_assignments, num_experts, multiple, by_size)
    ordered, assignments = torch.sort(flat, stable=True)
    slots = torch.arange(num_experts, device=device)
    begins = torch.searchsorted(ordered, slots)
    counts = torch.searchsorted(ordered, slots, right=True) - begins
    filled = _filled(counts, multiple, by_size)
    order = torch.argsort(filled, stable=True) if by_size else slots
    ends = filled[order].cumsum(0)
    first_rows = torch.empty_like(ends)
    first_rows[order] = ends - filled[order]
    is_kept = ordered < num_experts
    clamped = ordered.clamp(max=num_experts - 1)
    within = torch.arange(num_assignments, device=device) - begins[clamped]
    targets = torch.where(is_kept, first_rows[clamped] + within, rows - 1)
    place = torch.empty_like(targets).scatter_(0, assignments, targets)
    source = torch.full((rows,), num_assignments, dtype=torch.int64, device=device)
    source.scatter_(0, targets, assignments)
    source[-1] = num_assignments  # the row of dropped assignments
    return place, source, ends.to(torch.int32), order


@_layout.register_fake
def _(
    experts: Tensor, num_experts: int, multiple: int, by_size: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = num_rows(experts.numel(), num_experts, multiple, by_size)
    return (
        experts.new_empty(experts.numel()),
        experts.new_empty(rows),
        experts.new_empty(num_experts, dtype=torch.int32),
        experts.new_empty(num_experts),
    )


def lay_out(experts: Tensor, num_experts: int, *, multiple: int, by_size: bool) -> Layout:
    """The layout of ``experts`` ``[N, K]`` (int64; ``num_experts`` for a dropped assignment).

    Each expert has a ``multiple`` (a power of two) of rows. With ``by_size`` large numbers of rows
    are rounded more coarsely, and experts with equal numbers are adjacent, fewest first; otherwise
    experts keep their order.
    """
    return Layout(*_layout(experts, num_experts, multiple, by_size))


def sum_of_rows(rows: Tensor, place: Tensor, num_sums: int) -> Tensor:
    """Sums ``[n, X]`` over equal numbers of ``rows`` ``[R, X]``, listed in sequence in ``place``.

    An embedding bag: one pass, in a fixed order, which the compiler does not repeat in each reader
    of the sums.
    """
    offsets = torch.arange(0, len(place), len(place) // num_sums, device=place.device)
    bag = torch.ops.aten._embedding_bag_forward_only(rows.contiguous(), place, offsets, False, 0)
    sums: Tensor = bag[0]
    return sums
