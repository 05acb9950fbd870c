"""Files of runs as they are found: torn, huge, rolled back, missing."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.runs.trained_runs import train_line, val_line, write_lines
from ultrathink.core.errors import CheckpointError
from ultrathink.runs import reading
from ultrathink.runs.decisions import Audit, read_decisions
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.reading import RunReader
from ultrathink.runs.segments import Segment, append_segment

TORN = [
    "garbage\n",
    "\x00\x00\n",
    "[]\n",
    '{"step": "3", "split": "val", "time": 1.0}\n',
    '{"step": 3, "split": "test", "time": 1.0}\n',
    '{"step": 3, "split": "val"}\n',
]


@pytest.fixture
def reader(tmp_path: Path) -> RunReader:
    return RunReader(RunFolder(tmp_path))


def write(reader: RunReader, *lines: Any) -> None:
    write_lines(reader.run.metrics, lines)


def last_steps(reader: RunReader) -> dict[str, int]:
    return {split: record.step for split, record in reader.last_records().items()}


def that_count(steps: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """Of steps in the order of their lines, those that no later line undid: by definition."""

    def undoes(later: tuple[int, str], earlier: tuple[int, str]) -> bool:
        return later[0] < earlier[0] or (
            later[0] == earlier[0] and (later[1] == "train" or earlier[1] == later[1])
        )

    return [
        one
        for place, one in enumerate(steps)
        if not any(undoes(later, one) for later in steps[place + 1 :])
    ]


@settings(deadline=None, max_examples=60)
@given(
    course=st.lists(
        st.tuples(st.integers(1, 6), st.booleans()) | st.sampled_from(TORN), max_size=12
    ),
    end=st.sampled_from(["", '{"step": 3, "sp', '{"step": 1, "split": "val", "time": 1.0}']),
    block_bytes=st.sampled_from([1, 7, 64, 2**16]),
)
def test_what_counts_is_what_no_later_line_undid(
    tmp_path_factory: pytest.TempPathFactory, course: list[Any], end: str, block_bytes: int
) -> None:
    """Steps that go back and forth, each logged and perhaps validated, between damaged lines."""
    reader = RunReader(RunFolder(tmp_path_factory.mktemp("run")))
    lines: list[Any] = []
    steps: list[tuple[int, str]] = []
    for one in course:
        if isinstance(one, str):
            lines.append(one)
            continue
        step, is_validated = one
        lines += [train_line(step, 3.0), *([val_line(step, 3.0)] if is_validated else [])]
        steps += [(step, "train"), *([(step, "val")] if is_validated else [])]
    write(reader, *lines, end)
    expected = that_count(steps)
    assert [(record.step, record.split) for record in reader.history()] == expected
    assert reader.num_damaged == {"metrics.jsonl": sum(isinstance(x, str) for x in lines)}
    assert any("the last line is torn" in note for note in reader.notes) == bool(end)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "_BLOCK_BYTES", block_bytes)
        assert last_steps(reader) == {split: step for step, split in expected}


def test_of_a_huge_file_only_the_end_is_read(
    reader: RunReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = reader.run.metrics
    metrics.touch()
    os.truncate(metrics, 2**40)  # sparse: reading all of it would take an hour
    with metrics.open("a") as file:
        file.write("\n" + json.dumps(val_line(7, 4.0)) + "\n" + json.dumps(train_line(8, 3.0)))
        file.write("\n")
    assert last_steps(reader) == {"train": 8, "val": 7}
    write(reader, val_line(1, 4.0), *(train_line(n, None, note="text") for n in range(2, 50)))
    monkeypatch.setattr(reading, "SEARCHED_BYTES", 1000)
    last = reader.last_records()
    assert last.keys() == {"train"}  # a validation too far back is not searched
    assert math.isnan(last["train"].values["loss"])
    assert "note" not in last["train"].values


def test_files_that_are_missing_hold_no_lines(reader: RunReader) -> None:
    assert reader.history() == reader.decisions() == reader.samples() == reader.segments() == []
    assert reader.last_records() == reader.last_state() == {}
    assert reader.notes == []
    reader.run.decisions.mkdir()
    assert reader.attempt(reader.decisions) is None
    assert reader.notes == ["decisions.jsonl cannot be read: Is a directory."]


CONTENTS: list[tuple[Any, str]] = [
    (None, "is missing"),
    (b"", "is damaged"),
    (b"[1]", "is damaged (it holds no "),
    (b"a: [", "is damaged"),
    (b"\xff\xfe", "is damaged"),
    (Path, "cannot be read: Is a directory"),
]


@pytest.mark.parametrize("name", ["config.yaml", "data.json"])
@pytest.mark.parametrize(("content", "problem"), CONTENTS)
def test_a_file_that_cannot_be_read_is_named(
    reader: RunReader, name: str, content: Any, problem: str
) -> None:
    path = reader.run.path / name
    if content is Path:
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    read = reader.config if name == "config.yaml" else reader.data_record
    with pytest.raises(CheckpointError):
        read()
    assert reader.attempt(read) is None
    assert reader.notes[0].startswith(f"{name} {problem}")
    assert reader.notes[0].endswith(".")


# -- decisions and starts --------------------------------------------------------------------------

DECISION = {"id": 1, "step": 30, "rule": "spike", "action": "clip", "before": 1.0, "after": 0.5}
AUDIT = {"mean": -0.012, "low": -0.015, "high": -0.009, "orders": 4, "horizon": 200}


def test_the_last_line_of_a_decision_counts_and_damaged_ones_are_left_out(
    reader: RunReader,
) -> None:
    more = {"level": 2, "confidence": 0.9, "signals": {"loss": 7.1}, "reasoning": "Why."}
    first = {**DECISION, **more, "outcome": {"resolved": True}}
    back = {"action": "rollback", "before": 40, "after": 20}
    by_hand = {**DECISION, **back, "id": None, "rule": None}
    damaged = ['{"id": 2, "st\n', "[1, 2]\n", {**DECISION, "id": 3, "step": None}, {"step": 3}]
    again = {**DECISION, "id": 4, "after": 0.25, "level": "high", "signals": [], "audit": {}}
    lines = [first, *damaged, by_hand, {**DECISION, "id": 4}, by_hand, again, '{"id": 9']
    write_lines(reader.run.decisions, lines)
    found = reader.decisions()
    assert [(one.number, one.id, one.after, one.is_by_hand) for one in found] == [
        (1, 1, 0.5, False),
        (2, None, 20, True),
        (3, 4, 0.25, False),
        (4, None, 20, True),
    ]
    assert {name: getattr(found[0], name) for name in first} == first
    assert [one.rollback for one in found] == [None, (40, 20), None, (40, 20)]
    assert (found[2].level, found[2].signals, found[2].audit) == (None, {}, None)
    assert reader.num_damaged == {"decisions.jsonl": 4}
    ids = [one.get("id") for one in read_decisions(reader.run.decisions)]
    assert ids == [1, 3, None, None, 4, None]


@pytest.mark.parametrize(
    ("low", "high", "verdict", "words"),
    [
        (-0.2, -0.1, "helped", "excludes 0"),
        (0.1, 0.2, "hurt", "excludes 0"),
        (-0.1, 0.2, "unproven", "includes 0"),
        (-0.2, 0.0, "unproven", "includes 0"),
        (0.0, 0.2, "unproven", "includes 0"),
    ],
)
def test_an_audit_says_whether_its_interval_excludes_zero(
    low: float, high: float, verdict: str, words: str
) -> None:
    audit = Audit.from_json({**AUDIT, "low": low, "high": high})
    assert audit is not None
    assert audit.verdict == verdict
    assert words in audit.statement
    assert Audit.from_json(audit.to_json()) == audit
    assert Audit.from_json({**AUDIT, "low": None}) is None


def test_a_start_whose_command_is_odd_is_read(reader: RunReader) -> None:
    odd = ("train", "a\u2028b", os.fsdecode(b"\xff.yaml"))
    append_segment(reader.run.segments, Segment(0, command=odd))
    with reader.run.segments.open("a") as file:
        file.write('{"from_step": 9, "torn')
    append_segment(reader.run.segments, Segment(5, notes=("x",)))
    first, second = reader.segments()
    assert first.command[:2] == odd[:2]
    assert (second.from_step, second.notes) == (5, ("x",))
