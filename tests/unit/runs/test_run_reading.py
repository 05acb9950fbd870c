"""Files of runs as they are found: torn, huge, rolled back, missing."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from tests.unit.runs.trained_runs import train_line, val_line, write_lines
from ultrathink.core.errors import CheckpointError
from ultrathink.runs import reading
from ultrathink.runs.reading import (
    config_tree,
    history,
    json_object,
    last_records,
    parse_record,
)


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def steps(path: Path) -> dict[str, int]:
    return {split: record.step for split, record in last_records(path).items()}


def test_the_last_of_each_split(metrics: Path) -> None:
    write_lines(metrics, [train_line(1, 5.0), val_line(1, 4.0), train_line(2, 3.0)])
    assert steps(metrics) == {"train": 2, "val": 1}
    assert last_records(metrics)["val"].values["bits_per_byte"] == 2.0


@pytest.mark.parametrize(
    "end",
    [
        '{"step": 3, "split": "train", "time": 1.0, "lo',  # torn by a crash
        '{"step": 3, "split": "val", "time": 1.0, "loss": 1.0}',  # the newline is to come
        "garbage\n\n\x00\x00\n[]\n",
        '{"step": "3", "split": "val", "time": 1.0}\n',
        '{"step": 3, "split": "test", "time": 1.0}\n',
        '{"step": 3, "split": "val"}\n',
    ],
)
def test_lines_that_hold_no_record_are_passed_over(metrics: Path, end: str) -> None:
    write_lines(metrics, [train_line(1, 5.0), val_line(1, 4.0), train_line(2, 3.0), end])
    assert steps(metrics) == {"train": 2, "val": 1}
    assert [record.step for record in history(metrics)] == [1, 1, 2]


def test_what_was_not_finite_is_read_back_so() -> None:
    line = json.dumps(train_line(1, None, note="text")).encode() + b"\n"
    record = parse_record(line)
    assert record is not None
    assert math.isnan(record.values["loss"])
    assert "note" not in record.values


def test_a_record_may_lie_across_blocks(metrics: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(metrics, [val_line(1, 4.0), *(train_line(n, 3.0) for n in range(2, 50))])
    for size in (1, 7, 64, 200):
        monkeypatch.setattr(reading, "_BLOCK_BYTES", size)
        assert steps(metrics) == {"train": 49, "val": 1}


def test_a_validation_too_far_back_is_not_searched(
    metrics: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(metrics, [val_line(1, 4.0), *(train_line(n, 3.0) for n in range(2, 50))])
    monkeypatch.setattr(reading, "SEARCHED_BYTES", 1000)
    assert steps(metrics) == {"train": 49}


def test_of_a_huge_file_only_the_end_is_read(metrics: Path) -> None:
    metrics.touch()
    os.truncate(metrics, 2**40)  # sparse: reading all of it would take an hour
    with metrics.open("a") as file:
        file.write("\n" + json.dumps(val_line(7, 4.0)) + "\n" + json.dumps(train_line(8, 3.0)))
        file.write("\n")
    assert steps(metrics) == {"train": 8, "val": 7}


def test_an_empty_file_holds_nothing(metrics: Path) -> None:
    metrics.touch()
    assert last_records(metrics) == {}
    assert history(metrics) == []
    metrics.unlink()
    assert history(metrics) == []
    with pytest.raises(FileNotFoundError):
        last_records(metrics)


def test_what_a_rollback_undid_does_not_count(metrics: Path) -> None:
    rolled_back = [
        *(train_line(n, 5.0 - n) for n in (1, 2, 3, 4)),
        val_line(4, 1.5),
        train_line(3, 9.0),  # after going back to step 2
    ]
    write_lines(metrics, [train_line(1, 5.0), val_line(1, 4.5), *rolled_back[1:]])
    assert steps(metrics) == {"train": 3, "val": 1}
    found = [(r.step, r.split, r.values["loss"]) for r in history(metrics)]
    assert found == [
        (1, "train", 5.0),
        (1, "val", 4.5),
        (2, "train", 3.0),
        (3, "train", 9.0),
    ]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "config.yaml is missing."),
        (b"", r"config.yaml is damaged \(it holds no sections\)."),
        (b"a: [", "config.yaml is damaged"),
        (b"\xff\xfe", "config.yaml is damaged"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_named(
    tmp_path: Path, content: bytes | None, problem: str
) -> None:
    if content is not None:
        (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(CheckpointError, match=problem):
        config_tree(tmp_path)


def test_a_configuration_is_read_without_knowing_its_parts(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("training: {optimizer: {type: of_my_own, lr: 1e-3}}\n")
    assert config_tree(tmp_path)["training"]["optimizer"] == {"type": "of_my_own", "lr": 0.001}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "is missing"),
        (b"", "is damaged"),
        (b"[]", "holds no object"),
        (b"\xff", "is damaged"),
        (Path, "cannot be read"),
    ],
)
def test_an_object_that_cannot_be_read_is_named(tmp_path: Path, content: Any, problem: str) -> None:
    path = tmp_path / "manifest.json"
    if content is Path:
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=problem):
        json_object(path)
