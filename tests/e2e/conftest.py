from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.launching import Launched


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    """Starts a launcher below the test's folder, in ``place``."""
    started: list[Launched] = []

    def launched(*words: str, place: str = "here", **options: tuple[str, ...]) -> Launched:
        (tmp_path / place).mkdir(exist_ok=True)
        started.append(Launched(tmp_path / place, *words, **options))
        return started[-1]

    yield launched
    for one in started:
        one.kill()
