"""Experts that were split: which part of one may be chosen for a token, and what it weighs.

A copy of an expert that competes with it changes the output of a layer: with a fixed top_k the two
displace others. Here the parts of a split expert do not compete. A hyperplane divides the tokens
between them, so that exactly one can be chosen for each token, with the logit of the whole; and
each of m parts counts 1/m in the sum that normalizes the router's probabilities. So a token's
experts and gates are those of before the split.

A part can be split again: the splits of an expert are a binary tree with an expert at each leaf. A
split at depth d makes m = 2^d of the experts below it.

Shapes: B rows of a batch, T tokens, C hidden size, E slots for experts, one also for each split.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def parts_of(x: Tensor, side: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each expert may be chosen for a token ``[B, T, E]``, and its share 1/m ``[E]``.

    ``x`` is ``[B, T, C]``. ``side`` is ``[E, C + 1]``: the normal of a split's hyperplane, and its
    offset. ``branch`` ``[E, E]`` is 1 where an expert (row) has the tokens of a split (column)
    with ``normal @ x >= offset``, -1 where it has the others, 0 where it is not part of that split.
    """
    above = F.linear(x, side[:, :-1].to(x)) >= side[:, -1].to(x)
    signs = torch.where(above, 1.0, -1.0).to(x)
    branch = branch.to(x)
    depth = branch.abs().sum(-1)
    return F.linear(signs, branch) == depth, 0.5**depth  # sums of whole numbers are exact


def shares(branch: Tensor) -> Tensor:
    """The share 1/m of each expert ``[E]``, from ``branch`` ``[E, E]``."""
    return 0.5 ** branch.abs().sum(-1)


def split(
    side: Tensor, branch: Tensor, slots: slice, parts: tuple[int, int], plane: Tensor
) -> None:
    """Divide the tokens of the expert ``parts[0]`` with ``parts[1]``, both in the group ``slots``.

    Tokens above the hyperplane ``plane`` ``[C + 1]`` are those of ``parts[1]``.
    """
    kept, new = parts
    is_free = ~branch[:, slots].any(0)  # there are fewer splits than experts
    column = slots.start + int(is_free.nonzero()[0])
    branch[new] = branch[kept]
    branch[kept, column], branch[new, column] = -1, 1
    side[column] = plane


def siblings(branch: Tensor, expert: int) -> list[int]:
    """The experts that take the tokens of ``expert`` when it leaves; none if it is not split."""
    last = _last_split(branch, expert)
    if last is None:
        return []
    found: list[int] = (branch[:, last] == -branch[expert, last]).nonzero()[:, 0].tolist()
    return found


def leave(side: Tensor, branch: Tensor, expert: int) -> None:
    """Undo the last split of ``expert``, if any: its siblings take its tokens, and it has none."""
    last = _last_split(branch, expert)
    if last is not None:
        branch[:, last] = 0
        branch[expert] = 0
        side[last] = 0.0


def _last_split(branch: Tensor, expert: int) -> int | None:
    """The split that divided ``expert`` from its siblings: on its path that with fewest parts."""
    path = branch[expert].nonzero()[:, 0]
    if not len(path):
        return None
    return int(path[branch[:, path].abs().sum(0).argmin()])


def release(side: Tensor, branch: Tensor, slots: slice) -> None:
    """Undo the splits of a group: all its experts compete."""
    side[slots] = 0.0
    branch[slots] = 0
