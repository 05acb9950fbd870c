import os

import pytest

# The models of the tests are tiny: a second thread gains nothing, and where other processes use
# the cores, threads that wait for each other make a run ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A process for each core, four at most, for all tests; none for those that were named.

    They take seconds to start, which a few tests are not worth.
    """
    is_all = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    return min(os.cpu_count() or 1, 4) if is_all else 0
