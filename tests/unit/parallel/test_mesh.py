import itertools
from collections.abc import Iterator

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from ultrathink.config import load_config
from ultrathink.config.parallel import ParallelConfig
from ultrathink.core.errors import ConfigError
from ultrathink.parallel.mesh import AXES, ParallelDims
from ultrathink.parallel.world import World, join_world


def resolved(replicate: int, shard: int, num_processes: int, rank: int = 0) -> ParallelDims:
    parallel = ParallelConfig(dp_replicate=replicate, dp_shard=shard)
    return ParallelDims.resolve(parallel, World(rank, num_processes))


@pytest.mark.parametrize(
    ("replicate", "shard", "world", "expected"),
    [
        (1, -1, 1, (1, 1)),
        (1, -1, 8, (1, 8)),
        (2, -1, 8, (2, 4)),
        (8, -1, 8, (8, 1)),
        (2, 4, 8, (2, 4)),
    ],
)
def test_what_is_left_out_follows(
    replicate: int, shard: int, world: int, expected: tuple[int, int]
) -> None:
    dims = resolved(replicate, shard, world, rank=world - 1)
    assert (dims.dp_replicate, dims.dp_shard) == expected
    assert (dims.dp_group.rank, dims.dp_group.size) == (world - 1, world)


@pytest.mark.parametrize(
    ("replicate", "shard", "world", "words"),
    [
        (2, 2, 2, "2 x 2 = 4, but there are 2 processes; start 4"),
        (1, 2, 1, "1 x 2 = 2, but there is 1 process; start 2"),
        (3, -1, 4, "4 processes cannot be divided into 3 equal groups"),
        (2, -1, 1, "1 process cannot be divided into 2 equal groups"),
    ],
)
def test_impossible_products_name_the_numbers(
    replicate: int, shard: int, world: int, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        resolved(replicate, shard, world)


@pytest.mark.parametrize("shard", [0, -2])
def test_a_degree_that_is_no_number_of_processes(shard: int) -> None:
    with pytest.raises(ValueError, match=f"dp_shard is {shard}; give the number"):
        ParallelConfig(dp_shard=shard)


@pytest.mark.parametrize("name", ["cp", "tp", "pp", "ep"])
def test_a_degree_that_is_not_built_is_refused_in_a_sentence(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("debug", [f"parallel.{name}=2"])
    assert f"{name} is 2, but" in str(caught.value)
    assert f"set {name}=1 and divide the model with dp_shard" in str(caught.value)
    assert load_config("debug", [f"parallel.{name}=1"]).parallel == ParallelConfig()


def test_a_batch_is_divided_equally_or_refused() -> None:
    dims = resolved(2, 2, 4)
    assert dims.share(8) == 2
    with pytest.raises(ConfigError, match="= 9 cannot be divided by 4 processes; use 8 or 12"):
        dims.share(9)
    with pytest.raises(ConfigError, match="= 3 cannot be divided by 4 processes; use 4, or"):
        dims.share(3)


@pytest.fixture
def fake_world() -> Iterator[int]:
    """48 processes that are not there, for meshes of any shape; gone afterwards."""
    dist.init_process_group("fake", store=FakeStore(), rank=29, world_size=48)
    yield 48
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "sizes", [(1, 2, 3, 2, 4), (2, 3, 2, 4, 1), (4, 1, 3, 1, 4), (1, 6, 8, 1, 1)]
)
def test_a_process_lies_where_torch_puts_it(fake_world: int, sizes: tuple[int, ...]) -> None:
    """Only processes that differ along the axes of data parallelism hold different samples."""
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=AXES)
    named = dict(zip(AXES, sizes, strict=True))
    held: dict[int, list[int]] = {}
    for rank in range(fake_world):
        dims = ParallelDims(rank, **named)
        assert dims.num_processes == fake_world
        place = [dims.coordinate(axis) for axis in AXES]
        assert mesh.mesh[tuple(place)] == rank
        held.setdefault(dims.dp_group.rank, []).append(rank)
    replicate, shard = named["dp_replicate"], named["dp_shard"]
    assert sorted(held) == list(range(replicate * shard))
    for copy, part in itertools.product(range(replicate), range(shard)):
        same = sorted(mesh.mesh[:, copy, part].flatten().tolist())
        assert held[copy * shard + part] == same
    mine = ParallelDims(29, **named)
    assert tuple(mine.coordinate(axis) for axis in AXES) == mesh.get_coordinate()


def test_processes_of_one_machine_are_counted(
    monkeypatch: pytest.MonkeyPatch, fake_world: int
) -> None:
    for name, value in {"WORLD_SIZE": "48", "RANK": "29", "LOCAL_RANK": "5"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert join_world() == World(29, 48, 5, 48)  # as far as anybody knows
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert join_world() == World(29, 48, 5, 8)
