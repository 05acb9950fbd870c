"""The output of a forward pass."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ModelOutput(NamedTuple):
    """Logits of a forward pass without labels, or the summed loss of one with them.

    A named tuple, so that wrappers which look for tensors in an output (data parallel engines,
    compilers) find them.
    """

    logits: Tensor | None = None
    """``[B, T, vocab_size]``; None when labels were given."""

    loss: Tensor | None = None
    """Sum of the cross-entropy over trained tokens, in nats, without auxiliary losses."""

    num_tokens: Tensor | None = None
    """Number of trained tokens, a 64-bit integer; the loss is divided by it once per step."""

    aux_losses: dict[str, Tensor] = {}  # noqa: RUF012 - never written to
    """Weighted auxiliary losses by name, summed over trained tokens; add them to the loss."""

    stats: dict[str, Tensor] = {}  # noqa: RUF012 - never written to
    """Observations without gradient, summed over trained tokens (all tokens without labels).

    ``num_correct`` in evaluation mode; of L layers with experts in E slots and G groups
    ``expert_load``, ``expert_dropped``, ``expert_probability`` ``[L, E]``, ``expert_entropy`` and
    ``expert_confidence`` ``[L, G]``, as ``LayerRouting`` says.
    """

    head: dict[str, Tensor] = {}  # noqa: RUF012 - never written to
    """The result of the function ``head``, if one replaced logits and loss."""

    tapped: dict[int, Tensor] = {}  # noqa: RUF012 - never written to
    """Residual states ``[B, T, C]`` after the tapped layers, by index."""
