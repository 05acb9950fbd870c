"""Whole tensors and each process's part of them."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ultrathink.core.pieces import Piece


def placed_like(value: Tensor | Piece, reference: Tensor) -> Tensor:
    """``value``, whole or a piece, divided as ``reference`` is: this process's part, on its device.

    Where ``reference`` is whole, or ``value`` divided already, that is ``value`` itself.
    """
    if isinstance(value, DTensor) or not isinstance(reference, DTensor):
        assert isinstance(value, Tensor), "pieces are read for what is divided only"
        return value
    mesh, placements = reference.device_mesh, reference.placements
    offset, size = region_of(reference)
    if isinstance(value, Piece):
        assert value.local is not None, "it was read"
        assert value.offset == offset, "it was read for this process"
        part = value.local
    else:
        part = value[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))]
    return DTensor.from_local(
        part.to(reference.device_mesh.device_type).contiguous(),
        mesh,
        placements,
        run_check=False,
        shape=reference.shape,
        stride=reference.stride(),
    )


def region_of(tensor: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offset and size of what this process holds of ``tensor``."""
    size, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tuple(offset), tuple(size)


def piece_of(tensor: DTensor) -> Piece:
    """What this process holds of ``tensor``; nothing where another one holds the same."""
    mesh, placements = tensor.device_mesh, tensor.placements
    offset, size = region_of(tensor)
    position = mesh.get_coordinate()
    assert position is not None, "every process is in the mesh"
    is_copy = any(
        isinstance(placement, Replicate) and coordinate > 0
        for placement, coordinate in zip(placements, position, strict=True)
    )
    local = None if is_copy or 0 in size else tensor.to_local()
    return Piece(local, offset, tuple(tensor.shape), tensor.dtype)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every weight of ``model`` whole, on the CPU of the first process; nothing on the others.

    All processes call it.
    """
    whole: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        tensor = value.full_tensor() if isinstance(value, DTensor) else value
        if dist.get_rank() == 0:
            whole[name] = tensor.cpu()
    return whole
