"""All processes skip, change course and complain together."""

from functools import partial
from pathlib import Path

import pytest

from tests.distributed import tasks
from tests.distributed.conftest import RunTask
from tests.distributed.pool import Pool
from tests.distributed.test_checkpoints import BROKEN, ZERO_3
from tests.distributed.test_parity import assert_equal

FP64 = "training.precision=fp64"


def test_everyone_hears_everyone_and_the_status_of_the_first_to_fail(two: Pool) -> None:
    """Else a launcher that sees one end in silence restarts what was a mistake of the user's."""
    said = [{"a": [1, 2.5, None]}, "ü" * 5000]
    assert two.run(tasks.gathered, said) == [said, said]
    assert two.run(tasks.status_that_is_heard) == [2, 2]


def test_not_a_number_on_one_process_is_skipped_by_all(two: Pool, tmp_path: Path) -> None:
    first, second = two.run(tasks.train_with_nan_on_rank_1, str(tmp_path))
    assert first == second
    assert [skipped for skipped, _ in first] == [False, True, False, False]
    weights = [weight for _, weight in first]
    assert weights[0] == weights[1]
    assert weights[1] != weights[2]
    for log in ("run.log", "rank-1.log"):
        reported = (tmp_path / "runs" / "debug" / "logs" / log).read_text()
        assert "warning: step 2 was skipped: loss nan" in reported


def test_each_draws_its_own_numbers_and_scores_its_own_part(two: Pool, tmp_path: Path) -> None:
    first, second = two.run(tasks.random_number_and_scored_tokens, str(tmp_path))
    assert first[0] != second[0]
    assert first[1] == second[1] == first[2]


def test_a_controller_on_the_first_process_steers_all(
    two: Pool, alone: RunTask, tmp_path: Path
) -> None:
    one = alone(tasks.train_with_a_controller, FP64)
    task = partial(tasks.train_with_a_controller, copies_late=True)
    first, second = two.run(task, str(tmp_path), FP64)
    assert first == second
    assert first[1:] == one[1:] == (0.5, [7, 28, 3])
    assert_equal(one[0], first[0], 1e-9)


def test_a_guard_is_shown_the_whole_batch_on_each_process(alone: RunTask, both: RunTask) -> None:
    one, asked = alone(tasks.train_with_a_guard, FP64, "training.clip=null")
    first, second = both(tasks.train_with_a_guard, FP64, "training.clip=null")
    assert first == second
    assert first[1] == [pytest.approx(one, rel=1e-9) for one in asked]
    assert_equal(one, first[0], 1e-9)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            [["training.optimizer.lr=0.01"], ["training.optimizer.lr=0.02"]],
            [
                "process 1 was started with a different configuration than process 0",
                "training.optimizer.lr is 0.02 there and 0.01 here",
            ],
        ),
        (
            [["parallel.dp_replicate=3"]] * 2,
            ["2 processes cannot be divided into 3 equal groups"],
        ),
        (
            [["training.batch_size=5", "training.micro_batch_size=1"]] * 2,
            ["training.batch_size = 5 cannot be divided by 2 processes; use 4 or 6"],
        ),
    ],
)
def test_a_mistake_is_reported_by_the_first_process(
    two: Pool, tmp_path: Path, words: list[list[str]], said: list[str]
) -> None:
    first, second = two.run(tasks.message_of_a_mistake, str(tmp_path), words)
    assert second in (None, first)  # or it was found by both
    assert all(part in first for part in said)


def test_all_go_back_together_when_the_orchestrator_decides(alone: RunTask, both: RunTask) -> None:
    one, decided, skipped = alone(tasks.train_and_break, *BROKEN)
    assert [rule for rule, _, _ in decided] == ["skip_outliers", "roll_back"]
    assert skipped > 0
    results = both(tasks.train_and_break, *BROKEN, ZERO_3)
    assert [result[1:] for result in results] == [(decided, skipped)] * 2
    assert_equal(one, results[0][0], 1e-9)


@pytest.mark.parametrize("words", [(), ("orchestrator.snapshots.max_gib=0",)])
def test_all_return_to_their_best_together(
    alone: RunTask, both: RunTask, words: tuple[str, ...]
) -> None:
    """To a snapshot, or without one to a checkpoint."""
    one = alone(tasks.train_and_ruin, FP64, *words)
    results = both(tasks.train_and_ruin, FP64, *words, ZERO_3)
    assert one[1] == results[0][1] == results[1][1] == "returned to step 20"
    assert results[0][2] == pytest.approx(one[2], rel=1e-9)
    assert_equal(one[0], results[0][0], 1e-9)


@pytest.mark.parametrize(
    ("optimizer", "divided"), [("adamw", "offload=optimizer"), ("muon", "zero_stage=3")]
)
def test_experts_are_re_initialized_alike(
    alone: RunTask, both: RunTask, optimizer: str, divided: str
) -> None:
    """Where weights are divided an expert and its source may lie on different processes."""
    words = (FP64, f"training.optimizer={{type: {optimizer}, lr: 0.003}}")
    one, copied, _ = alone(tasks.train_and_revive, *words)
    first, second = both(tasks.train_and_revive, *words, f"parallel.{divided}")
    assert first == second
    assert first[1] == copied
    # Muon's matrices are made orthogonal in bf16, where a last bit of a sum shows.
    assert_equal(one, first[0], 1e-9 if optimizer == "adamw" else 1e-4)


@pytest.mark.long
@pytest.mark.parametrize(
    ("optimizer", "divided"),
    [("adamw", "zero_stage=1"), ("adamw", "offload=optimizer"), ("muon", "zero_stage=3")],
)
def test_experts_are_added_and_pruned_alike(
    alone: RunTask, both: RunTask, optimizer: str, divided: str
) -> None:
    """All choose the same experts, wherever their weights and moments lie."""
    words = (FP64, f"training.optimizer={{type: {optimizer}, lr: 0.003}}")
    one, done, problems = alone(tasks.train_and_operate, *words)
    first, second = both(tasks.train_and_operate, *words, f"parallel.{divided}")
    assert first == second
    assert problems == first[2] == []
    limit = 1e-9 if optimizer == "adamw" else 1e-4
    for here, there in zip(done, first[1], strict=True):
        for mine, other in zip(here, there, strict=True):
            assert other["loss"] == pytest.approx(mine["loss"], rel=limit)
        for mine, other in zip(here[1]["applied"], there[1]["applied"], strict=True):
            numbers = [{**each, "group": 0} for each in (mine, other)]
            assert mine["group"] == other["group"]
            assert numbers[1] == pytest.approx(numbers[0], rel=limit, abs=limit)
    assert_equal(one, first[0], limit)


def test_all_save_memory_where_one_is_short_of_it(alone: RunTask, both: RunTask) -> None:
    one, level, decided = alone(tasks.train_in_need, FP64)
    assert (level, decided) == ("none", [])
    results = both(tasks.train_in_need, FP64, ZERO_3)
    found = ("selective", [["save_memory", 1, "selective"]])
    assert [result[1:] for result in results] == [found, found]
    assert_equal(one, results[0][0], 1e-9)
