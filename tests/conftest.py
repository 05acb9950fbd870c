from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

# Before torch is imported, which reads it once. The models of the tests are tiny: a second thread
# gains nothing, and where others use the cores, threads that wait for each other make a run ten
# times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest

from tests import process_state
from tests.sharing import Shared

# What a shell starts in the background ignores interrupts, and so would all that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadline: a machine that is busy with other things breaks no property.
hypothesis.settings.register_profile("tests", deadline=None, max_examples=60)
hypothesis.settings.load_profile("tests")


_LONG_FOLDERS = ("e2e", "distributed")  # whole commands, and processes that train together


@pytest.hookimpl(tryfirst=True)  # before those that are marked are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as ``long`` what starts other processes, or calls a C++ compiler."""
    here = Path(__file__).parent
    for item in items:
        folder = item.path.relative_to(here).parts[0]
        if folder in _LONG_FOLDERS or item.get_closest_marker("compiled") is not None:
            item.add_marker(pytest.mark.long)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A process for each core, four at most, for all tests; none for those that were named.

    They take seconds to start, which a few tests are not worth.
    """
    is_all = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    return min(os.cpu_count() or 1, 4) if is_all else 0


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say how the order in which tests ran is had again, where one of them failed."""
    seed = config.getoption("randomly_seed", None)
    if terminalreporter.stats.get("failed") or terminalreporter.stats.get("error"):
        terminalreporter.write_line(f"The order was that of -p randomly --randomly-seed={seed}")


@pytest.fixture(autouse=True)
def _own_process_state() -> Iterator[None]:
    """Each test leaves the process as it found it; see ``process_state`` for what that is."""
    before = process_state.read()
    process_state.seed()
    yield
    process_state.restore(before)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """Folders that are made once in a run of tests, whichever of its processes needs them first."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    return Shared(base / "shared")


@pytest.fixture(scope="session", autouse=True)
def _shared_cache(shared: Shared) -> None:
    """Tokens, tokenizers and compiled code are kept for the run of tests, and not at home.

    Where a test asks what is in the cache, or damages it, it has one of its own.
    """
    os.environ["ULTRATHINK_CACHE"] = str(shared.base / "cache")


@pytest.fixture(scope="session")
def public_file() -> Callable[[str], Path]:
    """Path of a file of the public data sets; skips where the folder of them is absent."""
    named = os.environ.get("ULTRATHINK_TEST_DATA")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"

    def find(name: str) -> Path:
        path = folder / name
        if not path.is_file():
            pytest.skip(f"{path} is absent; name the folder of test data in ULTRATHINK_TEST_DATA")
        return path

    return find
