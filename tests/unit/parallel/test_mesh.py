import pytest

from ultrathink.config.parallel import ParallelConfig
from ultrathink.core.errors import ConfigError
from ultrathink.parallel.mesh import Degrees, check_batch, resolve_degrees


@pytest.mark.parametrize(
    ("replicate", "shard", "world", "expected"),
    [
        (1, -1, 1, Degrees(1, 1)),
        (1, -1, 8, Degrees(1, 8)),
        (2, -1, 8, Degrees(2, 4)),
        (8, -1, 8, Degrees(8, 1)),
        (2, 4, 8, Degrees(2, 4)),
    ],
)
def test_what_is_left_out_follows(
    replicate: int, shard: int, world: int, expected: Degrees
) -> None:
    parallel = ParallelConfig(dp_replicate=replicate, dp_shard=shard)
    assert resolve_degrees(parallel, world) == expected


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
        resolve_degrees(ParallelConfig(dp_replicate=replicate, dp_shard=shard), world)


@pytest.mark.parametrize("shard", [0, -2])
def test_a_degree_that_is_no_number_of_processes(shard: int) -> None:
    with pytest.raises(ValueError, match=f"dp_shard is {shard}; give the number"):
        ParallelConfig(dp_shard=shard)


def test_a_batch_is_divided_equally_or_refused() -> None:
    assert check_batch(8, 4) == 2
    with pytest.raises(ConfigError, match="= 9 cannot be divided by 4 processes; use 8 or 12"):
        check_batch(9, 4)
    with pytest.raises(ConfigError, match="= 3 cannot be divided by 4 processes; use 4, or"):
        check_batch(3, 4)
