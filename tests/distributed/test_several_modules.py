"""Runs that train several modules: on two processes they are the runs on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed import module_tasks
from tests.distributed.pool import Pool
from tests.distributed.test_objectives import STAGES, assert_same
from tests.distributed.test_parity import FP64, LIMIT
from ultrathink.checkpoint.format import load_checkpoint

TERMS = {"critic": "value", "mutual": "peer_kl"}
BOTH = pytest.mark.parametrize("objective", TERMS)


def words_of(objective: str) -> tuple[str, ...]:
    return (f"training.objective={objective}", "training.optimizer={type: adamw, lr: 0.01}")


def assert_equal(alone: str, run: str, objective: str, limit: float) -> None:
    assert_same(alone, run, TERMS[objective], limit)
    states: Any = [load_checkpoint(Path(one) / "checkpoints" / "last") for one in (alone, run)]
    assert_close(*(state["modules"] for state in states), limit)


def assert_close(one: Any, other: Any, limit: float) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_close(one[name], other[name], limit)
    else:
        assert float(np.abs(np.asarray(one) - np.asarray(other)).max()) <= limit


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The run of each objective on one process."""
    return {
        name: module_tasks.train(str(tmp_path_factory.mktemp(name)), *FP64, *words_of(name))
        for name in TERMS
    }


@BOTH
@STAGES
def test_two_processes_equal_one(
    two: Pool, tmp_path: Path, alone: dict[str, str], objective: str, overrides: tuple[str, ...]
) -> None:
    words = (*FP64, *words_of(objective), *overrides)
    run, _ = two.run(module_tasks.train, str(tmp_path), *words)
    assert_equal(alone[objective], run, objective, LIMIT)


@BOTH
def test_in_fp32(two: Pool, tmp_path: Path, objective: str) -> None:
    words = ("training.max_steps=3", *words_of(objective))
    alone = module_tasks.train(str(tmp_path / "one"), *words)
    run, _ = two.run(module_tasks.train, str(tmp_path / "two"), *words)
    assert_equal(alone, run, objective, 1e-5)


@BOTH
@pytest.mark.parametrize("place", ["offload=optimizer", "zero_stage=3"])
def test_going_back_and_loading_what_others_wrote(
    two: Pool, tmp_path: Path, objective: str, place: str
) -> None:
    """A run that goes back on two processes is that on one, and either reads what both wrote."""
    words = (*FP64[:1], *words_of(objective))
    alone = module_tasks.train_and_go_back(str(tmp_path / "one"), *words)
    run, _ = two.run(
        module_tasks.train_and_go_back, str(tmp_path / "two"), *words, f"parallel.{place}"
    )
    assert_equal(alone, run, objective, LIMIT)
    here, (there, _) = module_tasks.loaded_state(run), two.run(module_tasks.loaded_state, alone)
    assert here.keys() == {"model", "modules", "optimizer"}
    assert_close(here, there, LIMIT)


@pytest.mark.parametrize("stage", [1, 3])
def test_each_process_has_its_share_of_every_module(two: Pool, tmp_path: Path, stage: int) -> None:
    words = (*words_of("mutual"), f"parallel.zero_stage={stage}")
    for held in two.run(module_tasks.weights_at_rest, str(tmp_path), *words):
        mine, whole = held["peer"]
        assert 0.4 * whole < mine < 0.6 * whole


@BOTH
def test_a_checkpoint_that_is_recalled_brings_back_every_module(
    two: Pool, tmp_path: Path, objective: str
) -> None:
    for before, after in two.run(module_tasks.recall, str(tmp_path), *words_of(objective)):
        assert before.keys() == {"model", "modules", "optimizer"}
        assert_close(before, after, 0.0)
