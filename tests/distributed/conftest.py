from collections.abc import Iterator

import pytest

from tests.distributed.pool import Pool


@pytest.fixture(scope="session")
def two() -> Iterator[Pool]:
    """Two processes of one world, for all tests."""
    pool = Pool(2)
    yield pool
    pool.close()
