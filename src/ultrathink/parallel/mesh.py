"""Degrees of parallelism, their groups of processes, and the mesh of devices."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ultrathink.config.parallel import ParallelConfig
from ultrathink.core.errors import ConfigError
from ultrathink.parallel.world import Group, World

REPLICATE, SHARD = "dp_replicate", "dp_shard"
# Ranks count along these axes, the last one fastest, so that neighbors communicate most.
AXES = ("pp", REPLICATE, SHARD, "cp", "tp")


@dataclass(frozen=True)
class ParallelDims:
    """The degree of each kind of parallelism, and the position of the process ``rank``.

    All shares of a batch, and all groups of processes except the world, are defined here.
    ``ep`` is not an axis: experts are sharded over processes of the other axes.
    """

    rank: int = 0
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1

    @classmethod
    def resolve(cls, parallel: ParallelConfig, world: World) -> ParallelDims:
        """The degrees of ``world``; ConfigError if they do not fit its processes."""
        shard = parallel.dp_shard
        if shard == -1:
            shard = _what_is_left(parallel.dp_replicate, world.size)
        dims = cls(
            world.rank,
            parallel.dp_replicate,
            shard,
            parallel.cp,
            parallel.tp,
            parallel.pp,
            parallel.ep,
        )
        wanted = dims.num_processes
        if wanted != world.size:
            raise ConfigError(
                f"parallel.dp_replicate x parallel.dp_shard = {dims.dp_replicate} x {shard} = "
                f"{wanted}, but there {'are' if world.size != 1 else 'is'} "
                f"{_processes(world.size)}; start {wanted} (ultrathink launch --nproc {wanted}), "
                f"or set parallel.dp_shard=-1 to use all processes."
            )
        return dims

    @property
    def num_processes(self) -> int:
        """The number of processes over all axes."""
        return math.prod(self._sizes)

    @property
    def dp_group(self) -> Group:
        """The processes that hold different parts of a batch, and sum over it."""
        replicate, shard = (self.coordinate(axis) for axis in (REPLICATE, SHARD))
        return Group(replicate * self.dp_shard + shard, self.dp_replicate * self.dp_shard)

    def coordinate(self, axis: str) -> int:
        """The coordinate of this process along ``axis``."""
        place = AXES.index(axis)
        return self.rank // math.prod(self._sizes[place + 1 :]) % self._sizes[place]

    def share(self, batch_size: int) -> int:
        """The number of sequences of a batch on each process; ConfigError if it is not whole."""
        size = self.dp_group.size
        if batch_size % size:
            below = batch_size // size * size
            raise ConfigError(
                f"training.batch_size = {batch_size} cannot be divided by {size} processes; "
                f"use {f'{below} or ' if below else ''}{below + size}, or start a number of "
                f"processes that divides it."
            )
        return batch_size // size

    def dp_mesh(self, device_type: str) -> DeviceMesh:
        """The mesh of devices that hold the model, by replica and by shard."""
        shape = (self.dp_replicate, self.dp_shard)
        return init_device_mesh(device_type, shape, mesh_dim_names=(REPLICATE, SHARD))

    @property
    def _sizes(self) -> tuple[int, ...]:
        return tuple(getattr(self, axis) for axis in AXES)


ONE_PROCESS = ParallelDims()


def _what_is_left(replicate: int, num_processes: int) -> int:
    if num_processes % replicate:
        raise ConfigError(
            f"parallel.dp_replicate = {replicate}: {_processes(num_processes)} cannot be divided "
            f"into {replicate} equal groups; start a multiple of {replicate} (ultrathink launch "
            f"--nproc {replicate}), or set parallel.dp_replicate to a divisor of {num_processes}."
        )
    return num_processes // replicate


def _processes(number: int) -> str:
    return f"{number} process{'es' if number != 1 else ''}"
