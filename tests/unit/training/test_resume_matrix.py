"""Resuming, over everything that changes how a run continues, each pair of choices at least once.

``python -m tests.stress.matrix`` runs all combinations, compiled too, with real kills.
"""

import itertools
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.stress.evidence import best_step, differences
from tests.stress.matrix import COMMON, FACTORS, Combination, combinations
from tests.unit.training.conftest import MakeTrainer
from tests.unit.training.observers import At
from ultrathink import resume_trainer
from ultrathink.training.control import TrainerControl

Pair = tuple[str, str]
WORKERS = FACTORS["workers"]


def pairs(combination: Combination) -> set[Pair]:
    return set(itertools.combinations(combination, 2))


def covering() -> list[Combination]:
    """Few combinations that hold every pair of choices, chosen greedily.

    Those with worker processes take seconds to start: two of them, each the other's opposite, hold
    all their pairs.
    """
    with_workers = [one for one in combinations() if WORKERS[1] in one]
    without = [one for one in combinations() if WORKERS[0] in one]
    chosen = [with_workers[0], with_workers[-1]]
    missing = set().union(*map(pairs, combinations())) - pairs(chosen[0]) - pairs(chosen[1])
    while missing:
        best = max(without, key=lambda one: len(pairs(one) & missing))  # the first of equals
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def test_the_chosen_combinations_hold_every_pair() -> None:
    chosen = covering()
    assert len(chosen) <= 8
    for one, other in itertools.combinations(FACTORS.values(), 2):
        for pair in itertools.product(one, other):
            assert any(set(pair) <= set(combination) for combination in chosen), pair


def break_off_after(checkpoint: Path) -> Callable[[TrainerControl], None]:
    """What ends a run without saving on the way out, once ``checkpoint`` is written."""

    def break_off(control: TrainerControl) -> None:
        deadline = time.monotonic() + 30
        while not checkpoint.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        raise KeyboardInterrupt

    return break_off


def whole_and_resumed(make_trainer: MakeTrainer, *options: str) -> tuple[Path, Path]:
    """Two runs of 9 steps, one of which broke off after step 5 and continued from step 4."""
    common = (*COMMON, *options, "training.max_steps=9")
    # The number of workers changes nothing either.
    whole = make_trainer(*common, WORKERS[0], controllers=[At()])
    whole.fit()
    broken = make_trainer(*common)
    broken.controllers = [At(step5=break_off_after(broken.run.path / "checkpoints/step_00000004"))]
    with pytest.raises(KeyboardInterrupt):
        broken.fit()
    assert broken.progress.step == 5
    scramble_random_state()
    resumed = resume_trainer(broken.run, controllers=[At()])
    assert resumed.progress.step == 4
    assert resumed.fit().name == "finished"
    return whole.run.path, resumed.run.path


def scramble_random_state() -> None:
    """A new process begins with other random numbers than the one that stopped."""
    random.seed(999)
    np.random.seed(999)
    torch.manual_seed(999)


@pytest.mark.parametrize("combination", covering(), ids=lambda one: " ".join(one))
def test_a_run_that_broke_off_behind_its_checkpoint_continues_bit_for_bit(
    make_trainer: MakeTrainer, combination: Combination
) -> None:
    every = "training.checkpoint={every_steps: 2, keep: 9}"
    whole, resumed = whole_and_resumed(make_trainer, *combination, every)
    assert differences(whole, resumed) == []


def test_the_best_score_so_far_is_remembered(make_trainer: MakeTrainer) -> None:
    """Where the run grows worse, nothing after the resume may count as the best."""
    whole, resumed = whole_and_resumed(
        make_trainer,
        "training.optimizer={type: adamw, lr: 3.0}",
        "training.eval.every_steps=1",
        "training.checkpoint={every_steps: 2, keep: 9}",
    )
    assert best_step(whole, until=9) < 4
    assert differences(whole, resumed) == []
