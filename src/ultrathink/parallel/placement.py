"""Moves between whole tensors and the shards that each process holds."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ultrathink.core.shards import TensorShard


def placed_like(
    value: Tensor | TensorShard, reference: Tensor, *, is_for_host: bool = False
) -> Tensor:
    """``value`` sharded like ``reference``, on the device of ``reference`` or on the host.

    ``value`` is a whole tensor, a shard, or sharded in the same way on any device. If ``reference``
    is not sharded, ``value`` itself is returned, on whichever device it is.
    """
    if not isinstance(reference, DTensor):
        assert isinstance(value, Tensor), "shards are read only for sharded tensors"
        return value
    mesh = host_mesh(reference.device_mesh) if is_for_host else reference.device_mesh
    if isinstance(value, DTensor):
        if value.device_mesh == mesh:
            return value
        assert value.placements == reference.placements, "both are sharded in the same way"
        part = value.to_local()
    else:
        part = _part_of(value, reference)
    device = torch.device("cpu") if is_for_host else reference.device
    return _joined(part.to(device).contiguous(), mesh, reference)


def _part_of(value: Tensor | TensorShard, reference: DTensor) -> Tensor:
    offset, size = region_of(reference)
    if isinstance(value, Tensor):
        return value[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))]
    assert value.local is not None, "the shard was read"
    assert value.offset == offset, "the shard was read for this process"
    return value.local


def on_host(local: Tensor, reference: DTensor) -> DTensor:
    """A copy of ``reference`` on the host, of which ``local`` is this process's shard."""
    return _joined(local, host_mesh(reference.device_mesh), reference)


def host_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """A CPU mesh of the processes of ``mesh``; all of them call it."""
    return mesh if mesh.device_type == "cpu" else _host_mesh(mesh)


@cache
def _host_mesh(mesh: DeviceMesh) -> DeviceMesh:
    return DeviceMesh("cpu", mesh.mesh, mesh_dim_names=mesh.mesh_dim_names)


def _joined(local: Tensor, mesh: DeviceMesh, reference: DTensor) -> DTensor:
    return DTensor.from_local(
        local,
        mesh,
        reference.placements,
        run_check=False,
        shape=reference.shape,
        stride=reference.stride(),
    )


def region_of(tensor: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offset and size of this process's shard of ``tensor``."""
    size, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tuple(offset), tuple(size)


def shard_of(tensor: DTensor) -> TensorShard:
    """The shard of ``tensor`` that this process writes: none if it holds only a replica."""
    mesh, placements = tensor.device_mesh, tensor.placements
    offset, size = region_of(tensor)
    position = mesh.get_coordinate()
    assert position is not None, "every process is in the mesh"
    is_copy = any(
        isinstance(placement, Replicate) and coordinate > 0
        for placement, coordinate in zip(placements, position, strict=True)
    )
    local = None if is_copy or 0 in size else tensor.to_local()
    return TensorShard(local, offset, tuple(tensor.shape), tensor.dtype)
