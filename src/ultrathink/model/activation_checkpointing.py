"""Activation checkpointing: trades computation for memory in the backward pass.

https://pytorch.org/blog/activation-checkpointing-techniques/
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import ultrathink.model.depth.rows
import ultrathink.model.experts.products  # noqa: F401 - they make the operators named below
from ultrathink.core.errors import ConfigError, suggestion

CheckpointingMode = Literal["none", "selective", "full"]
MODES: tuple[str, ...] = ("none", "selective", "full")

Result = TypeVar("Result")

_aten = torch.ops.aten
# "selective" keeps the matrix products, which are expensive to recompute.
PRODUCTS = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.ultrathink.grouped_product.default,
    torch.ops.ultrathink.choose_tokens.default,
]
_KEEPING_PRODUCTS = partial(create_selective_checkpoint_contexts, PRODUCTS)
# Identifies the function in the compiler's cache, which cannot hash it.
_KEEPING_PRODUCTS.cache_hash = "products: " + ", ".join(map(str, PRODUCTS))  # type: ignore[attr-defined]


def check_mode(mode: str) -> CheckpointingMode:
    """Return ``mode``; ConfigError if it does not exist."""
    if mode not in MODES:
        raise ConfigError(
            f"there is no activation checkpointing called {mode!r}. {suggestion(mode, MODES)}"
        )
    return mode  # type: ignore[return-value]


def run_checkpointed(mode: CheckpointingMode, block: Callable[..., Result], *args: Any) -> Result:
    """``block(*args)``; the backward pass recomputes what ``mode`` does not keep.

    ``full`` keeps only the block's input, ``selective`` its products too.
    """
    if mode == "none":
        return block(*args)
    options: dict[str, Any] = {}
    if mode == "selective":
        options["context_fn"] = _KEEPING_PRODUCTS
    out: Result = checkpoint(block, *args, use_reentrant=False, **options)
    return out
