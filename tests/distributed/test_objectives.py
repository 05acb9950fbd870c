"""Objectives with several passes: a run on two processes is the run on one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import module_tasks, tasks, two_passes
from tests.distributed.pool import Pool
from tests.distributed.test_parity import FP64, LIMIT, assert_equal, rows

STAGES = pytest.mark.parametrize(
    "overrides",
    [
        ("parallel.dp_replicate=2",),
        ("parallel.zero_stage=1", "training.micro_batch_size=1"),
        ("parallel.zero_stage=2", "training.activation_checkpointing=full"),
        ("parallel.zero_stage=3", "training.micro_batch_size=1"),
        ("parallel.offload=params", "training.activation_checkpointing=selective"),
    ],
    ids=lambda overrides: ", ".join(word.partition(".")[2] for word in overrides),
)


def assert_same(alone: str, run: str, term: str, limit: float) -> None:
    assert_equal(alone, run, limit)
    for here, there in zip(rows(alone), rows(run), strict=True):
        if here["split"] == "train":
            assert there[term] == pytest.approx(here[term], rel=limit, abs=limit)


@pytest.fixture(scope="module")
def alone_twice(tmp_path_factory: pytest.TempPathFactory) -> str:
    return two_passes.train_twice(str(tmp_path_factory.mktemp("one")), *FP64)


@STAGES
def test_two_passes_with_one_backward_pass(
    two: Pool, tmp_path: Path, alone_twice: str, overrides: tuple[str, ...]
) -> None:
    run, _ = two.run(two_passes.train_twice, str(tmp_path), *FP64, *overrides)
    assert_same(alone_twice, run, "mirrored", LIMIT)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    """A run on one process that writes, which one that does not write equals."""
    place = tmp_path_factory.mktemp("writing")
    words = (*FP64, "model.dropout=0.1")
    run, texts = tasks.train_and_write(str(place), *words)
    assert_equal(tasks.train(str(place / "plain"), *words), run, 0.0)
    return run, texts


@pytest.fixture(scope="module")
def distill(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The option that names a teacher, of another shape."""
    words = ("model.hidden_size=16", "model.num_layers=3", "model.init={std: 0.5}", "run.seed=9")
    place = str(tmp_path_factory.mktemp("teacher"))
    teacher = tasks.train(place, *words, "training.max_steps=1")
    return f"training.objective={{type: distill, teacher: {teacher}, temperature: 2.0}}"


@pytest.fixture(scope="module")
def alone_distilled(tmp_path_factory: pytest.TempPathFactory, distill: str) -> str:
    return tasks.train(str(tmp_path_factory.mktemp("one")), *FP64, distill)


@STAGES
def test_a_teacher_on_two_processes(
    two: Pool, tmp_path: Path, distill: str, alone_distilled: str, overrides: tuple[str, ...]
) -> None:
    run, _ = two.run(tasks.train, str(tmp_path), *FP64, distill, *overrides)
    assert_same(alone_distilled, run, "kl", LIMIT)


def test_a_teacher_in_fp32(two: Pool, tmp_path: Path, distill: str) -> None:
    words = ("training.max_steps=3", distill)
    alone = tasks.train(str(tmp_path / "one"), *words)
    run, _ = two.run(tasks.train, str(tmp_path / "two"), *words)
    assert_same(alone, run, "kl", 1e-5)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_teacher_is_divided_where_the_model_is(
    two: Pool, tmp_path: Path, distill: str, stage: int
) -> None:
    """Between steps no process holds it whole."""
    for held in two.run(
        tasks.weights_at_rest, str(tmp_path), distill, f"parallel.zero_stage={stage}"
    ):
        mine, whole = held["teacher"]
        assert 0.4 * whole < mine < 0.6 * whole


@pytest.mark.parametrize(
    "overrides", [("parallel.zero_stage=1", "training.micro_batch_size=1"), ()]
)
def test_weights_of_targets_are_summed_over_all_processes(
    two: Pool, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    words = (*FP64, "training.objective=weighted", "model.z_loss=0.01")
    alone = module_tasks.train(str(tmp_path / "one"), *words)
    run, _ = two.run(module_tasks.train, str(tmp_path / "two"), *words, *overrides)
    assert_same(alone, run, "z_loss", LIMIT)


@STAGES
def test_a_model_in_training_writes_as_one_process_does(
    two: Pool, tmp_path: Path, alone: tuple[str, list[str]], overrides: tuple[str, ...]
) -> None:
    """It writes before training and amid it, and what is learned stays the same to the bit."""
    words = (*FP64, "model.dropout=0.1")
    (run, texts), other = two.run(tasks.train_and_write, str(tmp_path / "two"), *words, *overrides)
    assert texts == other[1]
    assert texts[0] == alone[1][0]  # dropout is another one from then on
    plain, _ = two.run(tasks.train, str(tmp_path / "plain"), *words, *overrides)
    assert_equal(plain, run, 0.0)
