from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest

from tests.distributed import tasks
from tests.distributed.pool import Pool

RunTask = Callable[..., Any]


@pytest.fixture(scope="package")
def two() -> Iterator[Pool]:
    """Two processes of one world, for all tests of this folder; none is left for others to see."""
    pool = Pool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="package")
def alone(tmp_path_factory: pytest.TempPathFactory) -> RunTask:
    """``alone(task, *words)`` is what a task returns on this process; each runs once."""
    return cache(lambda task, *words: task(str(tmp_path_factory.mktemp("one")), *words))


@pytest.fixture(scope="package")
def both(two: Pool, tmp_path_factory: pytest.TempPathFactory) -> RunTask:
    """What a task returns on each of two processes; each runs once."""
    return cache(lambda task, *words: two.run(task, str(tmp_path_factory.mktemp("two")), *words))


@pytest.fixture(scope="package")
def distill(alone: RunTask) -> str:
    """The option that names a teacher, of another shape."""
    words = ("model.hidden_size=16", "model.num_layers=3", "model.init={std: 0.5}", "run.seed=9")
    teacher = alone(tasks.train, *words, "training.max_steps=1")
    return f"training.objective={{type: distill, teacher: {teacher}, temperature: 2.0}}"
