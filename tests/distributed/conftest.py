from collections.abc import Iterator

import pytest

from tests.distributed.pool import Pool


@pytest.fixture(scope="package")
def two() -> Iterator[Pool]:
    """Two processes of one world, for all tests of this folder; none is left for others to see."""
    pool = Pool(2)
    yield pool
    pool.close()
