"""The shapes that the inputs of a model must have.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ultrathink.config.model import ModelConfig
from ultrathink.model.cache import CacheView


def check_shapes(
    input_ids: Tensor,
    of_tokens: Mapping[str, Tensor | None],
    positions: Tensor | None,
    lengths: Sequence[int] | None,
    cache: CacheView | None,
) -> None:
    """Raise ValueError, naming the input and its shape, for one that does not fit the others."""
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids has shape {list(input_ids.shape)}; it must be [B, T].")
    B, T = input_ids.shape
    for name, value in of_tokens.items():
        if value is not None and value.shape != input_ids.shape:
            raise ValueError(
                f"{name} has shape {list(value.shape)}; it must be that of input_ids, [{B}, {T}]."
            )
    if positions is not None and tuple(positions.shape) not in ((T,), (1, T), (B, T)):
        raise ValueError(
            f"positions has shape {list(positions.shape)}; it must be [{T}] or [{B}, {T}]."
        )
    if lengths is not None:
        fits = len(lengths) == B and all(0 <= length <= T for length in lengths)
        if not fits or (T > 0 and not any(lengths)):
            raise ValueError(
                f"lengths is {list(lengths)}; it must have {B} numbers of 0 to {T}, not all 0."
            )
    if cache is not None and of_tokens["document_ids"] is not None:
        raise ValueError("document_ids cannot be used with a cache, which holds one document each.")


def check_group_targets(
    group_targets: Tensor | None, input_ids: Tensor, config: ModelConfig
) -> None:
    """Raise ValueError for targets of the group gates that do not fit, or that nothing learns."""
    if group_targets is None:
        return
    if config.moe is None or not config.moe.group_gates:
        raise ValueError("group_targets needs a model with group gates (model.moe.group_gates).")
    wanted = [*input_ids.shape, len(config.moe.groups)]
    if list(group_targets.shape) != wanted:
        raise ValueError(
            f"group_targets has shape {list(group_targets.shape)}; it must be {wanted}, boolean."
        )
