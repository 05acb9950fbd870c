"""Objectives on two processes: what is divided, what is written, what is gone back to."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import tasks
from tests.distributed.conftest import RunTask
from tests.distributed.pool import Pool
from tests.distributed.test_parity import (
    ADAMW,
    DDP,
    FP64,
    LIMIT,
    MUTUAL,
    OFFLOADED_RECOMPUTED,
    ZERO_3,
    assert_close,
    assert_equal,
)


@pytest.mark.parametrize(("held", "stage"), [("teacher", 1), ("teacher", 3), ("peer", 3)])
def test_each_process_has_its_share_of_every_module(
    both: RunTask, distill: str, held: str, stage: int
) -> None:
    """Between steps no process holds it whole."""
    words = MUTUAL if held == "peer" else (distill,)
    for shares in both(tasks.weights_at_rest, *words, f"parallel.zero_stage={stage}"):
        mine, whole = shares[held]
        assert 0.4 * whole < mine < 0.6 * whole


@pytest.mark.parametrize("divided", [None, DDP, ZERO_3, OFFLOADED_RECOMPUTED])
def test_a_model_in_training_writes_and_learns_the_same(
    alone: RunTask, both: RunTask, divided: tuple[str, ...] | None
) -> None:
    """It writes before training and amid it, as one process does."""
    words = (*FP64, "model.dropout=0.1")
    reference, texts = alone(tasks.train_and_write, *words)
    if divided is None:
        assert_equal(alone(tasks.train, *words), reference, 0.0)
        return
    (run, written), other = both(tasks.train_and_write, *words, *divided)
    assert written == other[1]
    assert written[0] == texts[0]  # dropout is another one from then on
    assert_equal(both(tasks.train, *words, *divided)[0], run, 0.0)


@pytest.mark.parametrize(
    ("objective", "place"), [("mutual", "offload=optimizer"), ("critic", "zero_stage=3")]
)
def test_going_back_and_loading_what_others_wrote(
    two: Pool, alone: RunTask, both: RunTask, objective: str, place: str
) -> None:
    """A run that goes back on two processes is that on one, and either reads what both wrote."""
    words = (FP64[0], f"training.objective={objective}", ADAMW)
    one, *_ = alone(tasks.train_with_a_controller, *words)
    (run, *_), _ = both(tasks.train_with_a_controller, *words, f"parallel.{place}")
    assert_equal(one, run, LIMIT)
    here, (there, _) = tasks.loaded_state(run), two.run(tasks.loaded_state, one)
    assert here.keys() == {"model", "modules", "optimizer", "data"}
    assert_close(here, there, LIMIT)


def test_a_checkpoint_that_is_recalled_brings_back_every_module(two: Pool, tmp_path: Path) -> None:
    for before, after in two.run(tasks.recall, str(tmp_path), *MUTUAL):
        assert before.keys() == {"model", "modules", "optimizer", "data"}
        assert_close(before, after)
