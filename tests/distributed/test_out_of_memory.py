"""Where one of several processes runs out of memory, all go on smaller from a checkpoint."""

import json
from pathlib import Path

import pytest

from tests.distributed import tasks
from tests.distributed.pool import Pool
from tests.distributed.test_parity import assert_equal


def test_the_next_start_takes_smaller_micro_batches(two: Pool, tmp_path: Path) -> None:
    (path, first, steps), (_, second, _) = two.run(tasks.train_out_of_memory, str(tmp_path / "hit"))
    assert first.startswith("process 0 ran out of memory with micro-batches of 2 (")
    assert second.startswith("process 1 ran out of memory")
    assert "resume from the last checkpoint with 1" in first
    assert steps == [2]
    left = json.loads((Path(path) / "out_of_memory.json").read_text())
    assert (left["step"], left["before"], left["after"]) == (4, 2, 1)

    results = two.run(tasks.resume_with_little_memory, path)
    for rank, (tried, size, reported) in enumerate(results):
        assert tried == [1] * 2 * 4  # steps 3 to 6
        assert size == 1
        if rank == 0:
            [change] = reported
            assert change.startswith("micro_batch_size: 2 -> 1 (step 4 ran out of memory on proc")
    assert "micro_batch_size: 2 -> 1" in (Path(path) / "logs" / "rank-1.log").read_text()
    [line] = (Path(path) / "decisions.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert (record["step"], record["action"], record["after"]) == (2, "micro_batch_size", 1)
    whole = two.run(tasks.train, str(tmp_path / "whole"), "training.max_steps=6")[0]
    assert_equal(whole, path, 1e-5)


def test_a_run_without_a_checkpoint_applies_it_and_a_given_size_is_tried_again(
    two: Pool, tmp_path: Path
) -> None:
    path = two.run(tasks.train_out_of_memory, str(tmp_path))[0][0]
    for tried, size, _ in two.run(
        tasks.resume_with_little_memory, path, "training.micro_batch_size=2"
    ):
        assert (tried, size) == ([2], 2)
    for tried, size, _ in two.run(tasks.resume_with_little_memory, path):
        assert tried == [1] * 2 * 4
        assert size == 1


@pytest.mark.parametrize(
    "words",
    [
        ("training.optimizer={type: adamw}", "parallel.offload=optimizer"),
        ("training.optimizer={type: muon}", "parallel.offload=params"),
        ("training.optimizer={type: muon}", *tasks.EXPERTS),
    ],
)
def test_allocated_state_is_divided_like_that_of_a_step(
    two: Pool, tmp_path: Path, words: tuple[str, ...]
) -> None:
    for early, late in two.run(tasks.optimizer_state_before_and_after, str(tmp_path), *words):
        assert early == late
        assert any(value[0] == "DTensor" for value in early.values())
