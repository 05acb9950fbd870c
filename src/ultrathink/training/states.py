"""Nested state: copied and measured."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor


def cloned(node: Any) -> Any:
    """A copy of nested state with tensors of its own, each where it was."""
    if isinstance(node, Tensor):
        return node.detach().clone()
    if isinstance(node, dict):
        return {key: cloned(value) for key, value in node.items()}
    if isinstance(node, list):
        return [cloned(value) for value in node]
    return node


def size_bytes(node: Any) -> int:
    """The bytes that the tensors in nested state take on this process."""
    if isinstance(node, DTensor):
        return size_bytes(node.to_local())
    if isinstance(node, Tensor):
        return node.numel() * node.element_size()
    if isinstance(node, dict):
        return sum(size_bytes(value) for value in node.values())
    if isinstance(node, list):
        return sum(size_bytes(value) for value in node)
    return 0
