"""Degrees of parallelism, the group of processes, and the mesh of devices."""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ultrathink.config.parallel import ParallelConfig
from ultrathink.core.errors import ConfigError
from ultrathink.parallel.world import Group, World


@dataclass(frozen=True)
class ParallelDims:
    """The degree of each kind of parallelism, and the position of the process ``rank``.

    All shares of a batch, and all groups of processes except the world, are defined here. Ranks
    count along shards first, so that neighbors communicate most.
    """

    rank: int = 0
    dp_replicate: int = 1
    dp_shard: int = 1

    @classmethod
    def resolve(cls, parallel: ParallelConfig, world: World) -> ParallelDims:
        """The degrees of ``world``; ConfigError if they do not fit its processes."""
        shard = parallel.dp_shard
        if shard == -1:
            shard = _what_is_left(parallel.dp_replicate, world.size)
        dims = cls(world.rank, parallel.dp_replicate, shard)
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
        """The number of processes of the run."""
        return self.dp_replicate * self.dp_shard

    @property
    def dp_group(self) -> Group:
        """The processes that hold different parts of a batch, and sum over it."""
        return Group(self.rank, self.num_processes)

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
        return init_device_mesh(device_type, shape, mesh_dim_names=("dp_replicate", "dp_shard"))


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
