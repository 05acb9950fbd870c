"""Evaluators on two processes: the scores of one, and one failure that all know of."""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import tasks
from tests.distributed.conftest import RunTask
from tests.distributed.pool import Pool
from tests.distributed.test_parity import assert_equal
from tests.unit.training.observers import records
from ultrathink.runs.folder import RunFolder

WORDS = (
    "training.precision=fp64",
    "training.max_steps=4",
    "training.evaluators=[{type: text, name: words, every_steps: 2, "
    "source: {type: dummy, seed: 5, num_documents: 3, num_words: 30}}, "
    "{type: samples, prompts: [the], max_new_tokens: 5, every_steps: 4}]",
)


def evaluated(run: str) -> list[dict[str, Any]]:
    return [row for row in records(RunFolder(Path(run))) if row["split"] == "eval"]


@pytest.mark.parametrize("divided", ["parallel.dp_replicate=2", "parallel.zero_stage=3"])
def test_two_processes_find_what_one_does(alone: RunTask, both: RunTask, divided: str) -> None:
    one, (run, _) = alone(tasks.train, *WORDS), both(tasks.train, *WORDS, divided)
    assert [row["step"] for row in evaluated(one)] == [2, 4]
    assert_equal(one, run, 1e-9)


def test_what_one_process_fails_at_is_left_out_on_all(
    two: Pool, tmp_path: Path, alone: RunTask
) -> None:
    words = (*WORDS, "parallel.dp_replicate=2")
    run, _ = two.run(tasks.train_with_an_evaluator_that_fails_on_process_1, str(tmp_path), *words)
    expected = evaluated(alone(tasks.train, *WORDS))[1:]
    assert [sorted(row) for row in evaluated(run)] == [sorted(row) for row in expected]
    log = (Path(run) / "logs" / "run.log").read_text()
    reported = (
        "evaluator 'words' failed at step 2: OSError: its disk is gone (on process 1); training"
    )
    assert log.count(reported) == 1
