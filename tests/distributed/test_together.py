"""All processes skip, change course and complain together."""

from functools import partial
from pathlib import Path

import pytest

from tests.distributed import tasks
from tests.distributed.pool import Pool
from tests.distributed.steered_tasks import train_and_ruin
from tests.distributed.test_parity import assert_equal


def test_everyone_hears_everyone(two: Pool) -> None:
    said = [{"a": [1, 2.5, None]}, "ü" * 5000]
    assert two.run(tasks.gathered, said) == [said, said]


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


def test_a_controller_on_the_first_process_steers_all(two: Pool, tmp_path: Path) -> None:
    words = ("training.precision=fp64",)
    alone = tasks.train_with_a_controller(str(tmp_path / "one"), *words)
    task = partial(tasks.train_with_a_controller, copies_late=True)
    first, second = two.run(task, str(tmp_path / "two"), *words)
    assert first == second
    assert first[1:] == alone[1:] == (0.5, [7, 28, 3])
    assert_equal(alone[0], first[0], 1e-9)


def test_a_guard_is_shown_the_whole_batch_on_each_process(two: Pool, tmp_path: Path) -> None:
    words = ("training.precision=fp64", "training.clip=null")
    alone, asked = tasks.train_with_a_guard(str(tmp_path / "one"), *words)
    first, second = two.run(tasks.train_with_a_guard, str(tmp_path / "two"), *words)
    assert first == second
    assert first[1] == [pytest.approx(one, rel=1e-9) for one in asked]
    assert_equal(alone, first[0], 1e-9)


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


def test_all_go_back_together_when_the_orchestrator_decides(two: Pool, tmp_path: Path) -> None:
    words = ("training.precision=fp64", "parallel.zero_stage=3")
    alone, decided, skipped = tasks.train_and_break(str(tmp_path / "one"), words[0])
    assert [rule for rule, _, _ in decided] == ["skip_outliers", "roll_back"]
    assert skipped > 0
    results = two.run(tasks.train_and_break, str(tmp_path / "two"), *words)
    assert [result[1:] for result in results] == [(decided, skipped)] * 2
    assert_equal(alone, results[0][0], 1e-9)


@pytest.mark.parametrize("holds", ["snapshot", "checkpoint"])
def test_all_return_to_their_best_together(two: Pool, tmp_path: Path, holds: str) -> None:
    words = ["training.precision=fp64", "parallel.zero_stage=3"]
    if holds == "checkpoint":
        words.append("orchestrator.snapshots.max_gib=0")
    alone = train_and_ruin(str(tmp_path / "one"), words[0], *words[2:])
    results = two.run(train_and_ruin, str(tmp_path / "two"), *words)
    assert alone[1] == results[0][1] == results[1][1] == "returned to step 20"
    assert results[0][2] == pytest.approx(alone[2], rel=1e-9)
    assert_equal(alone[0], results[0][0], 1e-9)


@pytest.mark.parametrize(
    "words",
    [
        ("training.optimizer={type: adamw, lr: 0.003}", "parallel.zero_stage=2"),
        ("training.optimizer={type: muon}", "parallel.zero_stage=3"),
        ("training.optimizer={type: adamw, lr: 0.003}", "parallel.offload=optimizer"),
    ],
)
def test_experts_are_re_initialized_alike(
    two: Pool, tmp_path: Path, words: tuple[str, ...]
) -> None:
    """Where weights are divided an expert and its source may lie on different processes."""
    alone, copied, _ = tasks.train_and_revive(
        str(tmp_path / "one"), "training.precision=fp64", words[0]
    )
    first, second = two.run(
        tasks.train_and_revive, str(tmp_path / "two"), "training.precision=fp64", *words
    )
    assert first == second
    assert first[1] == copied
    # Muon's matrices are made orthogonal in bf16, where a last bit of a sum shows.
    assert_equal(alone, first[0], 1e-9 if "adamw" in words[0] else 1e-4)


def test_all_save_memory_where_one_is_short_of_it(two: Pool, tmp_path: Path) -> None:
    words = ("training.precision=fp64", "parallel.zero_stage=3")
    alone, level, decided = tasks.train_in_need(str(tmp_path / "one"), words[0])
    assert (level, decided) == ("none", [])
    results = two.run(tasks.train_in_need, str(tmp_path / "two"), *words)
    found = ("selective", [["save_memory", 1, "selective"]])
    assert [result[1:] for result in results] == [found, found]
    assert_equal(alone, results[0][0], 1e-9)


def test_who_ends_in_silence_ends_with_the_status_of_the_first_to_fail(two: Pool) -> None:
    """Else a launcher that sees it end sooner restarts what was a mistake of the user's."""
    assert two.run(tasks.status_that_is_heard) == [2, 2]
