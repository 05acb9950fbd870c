"""Whole tensors and each process's part of them."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ultrathink.core.pieces import Piece


def placed_like(value: Tensor, reference: Tensor) -> Tensor:
    """``value``, which is whole, divided as ``reference`` is: this process's part, on its device.

    Where ``reference`` is whole, or ``value`` divided already, that is ``value`` itself.
    """
    if not isinstance(reference, DTensor) or isinstance(value, DTensor):
        return value
    mesh, placements = reference.device_mesh, reference.placements
    size, offset = compute_local_shape_and_global_offset(reference.shape, mesh, placements)
    part = value[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))]
    return DTensor.from_local(
        part.to(reference.device_mesh.device_type).contiguous(),
        mesh,
        placements,
        run_check=False,
        shape=reference.shape,
        stride=reference.stride(),
    )


def piece_of(tensor: DTensor) -> Piece:
    """What this process holds of ``tensor``; nothing where another one holds the same."""
    mesh, placements = tensor.device_mesh, tensor.placements
    size, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    position = mesh.get_coordinate()
    assert position is not None, "every process is in the mesh"
    is_copy = any(
        isinstance(placement, Replicate) and coordinate > 0
        for placement, coordinate in zip(placements, position, strict=True)
    )
    local = None if is_copy or 0 in size else tensor.to_local()
    return Piece(local, tuple(offset), tuple(tensor.shape), tensor.dtype)


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
