"""Trading computation for memory: what a block saves for the backward pass.

https://pytorch.org/blog/activation-checkpointing-techniques/
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import ultrathink.model.experts.products  # noqa: F401 - it makes the operator named below
from ultrathink.core.errors import ConfigError, suggestion

CheckpointingMode = Literal["none", "selective", "full"]
MODES: tuple[str, ...] = ("none", "selective", "full")

Result = TypeVar("Result")

_aten = torch.ops.aten
# What "selective" keeps: the products, which are dear to compute again.
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
]
_KEEPING_PRODUCTS = partial(create_selective_checkpoint_contexts, PRODUCTS)
# By this the compiler's cache knows the function, which it cannot read.
_KEEPING_PRODUCTS.cache_hash = "products: " + ", ".join(map(str, PRODUCTS))  # type: ignore[attr-defined]


def check_mode(mode: str) -> CheckpointingMode:
    """``mode`` itself; ConfigError for one that does not exist."""
    if mode not in MODES:
        raise ConfigError(
            f"there is no activation checkpointing called {mode!r}. {suggestion(mode, MODES)}"
        )
    return mode  # type: ignore[return-value]


def run_checkpointed(mode: CheckpointingMode, block: Callable[..., Result], *args: Any) -> Result:
    """``block(*args)``, of which the backward pass computes again what ``mode`` does not keep.

    ``full`` keeps the block's input alone, ``selective`` its products too.
    """
    if mode == "none":
        return block(*args)
    options: dict[str, Any] = {}
    if mode == "selective":
        options["context_fn"] = _KEEPING_PRODUCTS
    out: Result = checkpoint(block, *args, use_reentrant=False, **options)
    return out
