"""Evaluators on two processes: the scores of one, and one failure that all know of."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import tasks
from tests.distributed.pool import Pool

WORDS = (
    "training.precision=fp64",
    "training.max_steps=4",
    "training.evaluators=[{type: text, name: words, every_steps: 2, "
    "source: {type: dummy, seed: 5, num_documents: 3, num_words: 30}}, "
    "{type: samples, prompts: [the], max_new_tokens: 5, every_steps: 4}]",
)


def evaluated(run: str) -> list[dict[str, Any]]:
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == "eval"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tasks.train(str(tmp_path_factory.mktemp("one")), *WORDS)


@pytest.mark.parametrize("divided", ["parallel.dp_replicate=2", "parallel.zero_stage=3"])
def test_two_processes_find_what_one_does(
    two: Pool, tmp_path: Path, alone: str, divided: str
) -> None:
    run, _ = two.run(tasks.train, str(tmp_path), *WORDS, divided)
    assert [row["step"] for row in evaluated(alone)] == [2, 4]
    for here, there in zip(evaluated(alone), evaluated(run), strict=True):
        assert here.keys() == there.keys()
        for name in here.keys() - {"split", "time"}:
            assert there[name] == pytest.approx(here[name], rel=1e-9), name


def test_what_one_process_fails_at_is_left_out_on_all(
    two: Pool, tmp_path: Path, alone: str
) -> None:
    words = (*WORDS, "parallel.dp_replicate=2")
    run, _ = two.run(tasks.train_with_an_evaluator_that_fails_on_process_1, str(tmp_path), *words)
    assert [sorted(row) for row in evaluated(run)] == [sorted(row) for row in evaluated(alone)[1:]]
    log = (Path(run) / "logs" / "run.log").read_text()
    reported = (
        "evaluator 'words' failed at step 2: OSError: its disk is gone (on process 1); training"
    )
    assert log.count(reported) == 1
