"""Degrees of parallelism, and the mesh of devices that they make."""

from __future__ import annotations

from typing import NamedTuple

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ultrathink.config.parallel import ParallelConfig
from ultrathink.core.errors import ConfigError

REPLICATE, SHARD = "dp_replicate", "dp_shard"


class Degrees(NamedTuple):
    """How many copies of the model there are, and by how many processes each is shared."""

    replicate: int
    shard: int


SINGLE = Degrees(1, 1)


def resolve_degrees(parallel: ParallelConfig, world_size: int) -> Degrees:
    """The degrees of a world of ``world_size`` processes; ConfigError where they do not fit."""
    replicate, shard = parallel.dp_replicate, parallel.dp_shard
    if shard == -1:
        if world_size % replicate:
            raise ConfigError(
                f"parallel.dp_replicate = {replicate}: {world_size} "
                f"process{'es' if world_size != 1 else ''} cannot be divided into {replicate} "
                f"equal groups; start a multiple of {replicate} (ultrathink launch --nproc "
                f"{replicate}), or set parallel.dp_replicate to a divisor of {world_size}."
            )
        return Degrees(replicate, world_size // replicate)
    if replicate * shard != world_size:
        raise ConfigError(
            f"parallel.dp_replicate x parallel.dp_shard = {replicate} x {shard} = "
            f"{replicate * shard}, but there "
            f"{'are' if world_size != 1 else 'is'} {world_size} "
            f"process{'es' if world_size != 1 else ''}; start {replicate * shard} (ultrathink "
            f"launch --nproc {replicate * shard}), or set parallel.dp_shard=-1 to take what is "
            f"there."
        )
    return Degrees(replicate, shard)


def check_batch(batch_size: int, world_size: int) -> int:
    """Sequences that each process takes of a batch; ConfigError where they cannot be equal."""
    if batch_size % world_size:
        below = batch_size // world_size * world_size
        raise ConfigError(
            f"training.batch_size = {batch_size} cannot be divided by {world_size} processes; "
            f"use {f'{below} or ' if below else ''}{below + world_size}, or start a number of "
            f"processes that divides it."
        )
    return batch_size // world_size


def build_mesh(degrees: Degrees, device_type: str) -> DeviceMesh:
    """The devices of all processes, by copy of the model and by share of it."""
    return init_device_mesh(
        device_type, (degrees.replicate, degrees.shard), mesh_dim_names=(REPLICATE, SHARD)
    )
