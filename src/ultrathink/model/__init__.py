"""The network: a decoder of the Llama family in plain PyTorch, without files or processes."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ultrathink.model.attention_backends import choose_backend
    from ultrathink.model.cache import CacheFullError, CacheView, ContiguousCache
    from ultrathink.model.compute_path import ComputePath
    from ultrathink.model.flops import count_parameters, flops_per_token
    from ultrathink.model.output import ModelOutput
    from ultrathink.model.transformer import Transformer

_HOMES = {  # imported when first used, since they need torch
    "CacheFullError": "cache",
    "CacheView": "cache",
    "ComputePath": "compute_path",
    "ContiguousCache": "cache",
    "ModelOutput": "output",
    "Transformer": "transformer",
    "choose_backend": "attention_backends",
    "count_parameters": "flops",
    "flops_per_token": "flops",
}
__all__ = [
    "CacheFullError",
    "CacheView",
    "ComputePath",
    "ContiguousCache",
    "ModelOutput",
    "Transformer",
    "choose_backend",
    "count_parameters",
    "flops_per_token",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
