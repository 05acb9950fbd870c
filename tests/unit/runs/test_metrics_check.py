"""Lines of metrics that are torn, missing, twice there or out of order."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.runs.trained_runs import make_run, train_line, val_line, write_lines
from ultrathink.config import Config
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.metrics_check import check_metrics
from ultrathink.runs.segments import ConfigChange, Segment, append_segment


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return make_run(tmp_path)


def logged(run: RunFolder, every: int, *others: str) -> Config:
    changes: dict[str, Any] = {"training.log_every": every}
    return run.read_config().replace(changes, origin="test")


def train_lines(*steps: int) -> list[dict[str, Any]]:
    return [train_line(step, 3.0) for step in steps]


def found(run: RunFolder, config: Config | None, saved: int = 0) -> list[tuple[str, str]]:
    return list(check_metrics(run, config, saved))


def test_all_lines_are_there(run: RunFolder) -> None:
    write_lines(run.metrics, [*train_lines(1, 5, 10), val_line(10, 2.0), *train_lines(12)])
    assert found(run, logged(run, 5), 12) == [("ok", "5 lines, up to step 12")]


@pytest.mark.parametrize("saved", [0, 10])
def test_no_metrics_are_damage_only_where_there_should_be_some(run: RunFolder, saved: int) -> None:
    config = run.read_config()
    expected = ("damaged", "is missing") if saved else ("note", "there is none yet")
    assert found(run, config, saved) == [expected]
    silent = config.replace({"monitoring.sinks": ["console"]}, origin="test")
    assert found(run, silent, saved) == []


def test_torn_lines(run: RunFolder) -> None:
    lines = [*train_lines(1), "{\n", *train_lines(2), '{"step": 3\n', "\n", *train_lines(3), "{"]
    write_lines(run.metrics, lines)
    assert found(run, logged(run, 1)) == [
        ("damaged", "3 lines (2, 4, 5) cannot be read"),
        ("note", "its last line is torn, as by a crash; a resume drops it"),
    ]


def test_lines_out_of_order(run: RunFolder) -> None:
    write_lines(run.metrics, train_lines(1, 2, 3, 3, 4, 2, 3, 4))
    assert found(run, logged(run, 1)) == [
        ("damaged", "line 4 (step 3) follows step 3, and 1 more like it")
    ]


def test_a_rollback_explains_why_steps_go_back(run: RunFolder) -> None:
    write_lines(run.metrics, train_lines(1, 2, 3, 4, 3, 4, 5))
    change = {"id": None, "step": 4, "action": "rollback", "before": 4, "after": 2}
    write_lines(run.decisions, ["torn\n", {"action": "clip", "before": 4, "after": 2}])
    assert found(run, logged(run, 1))[0][0] == "damaged"
    write_lines(run.decisions, [json.dumps({**change, "after": 3}) + "\n"])
    assert found(run, logged(run, 1))[0][0] == "damaged"
    write_lines(run.decisions, [change])
    assert found(run, logged(run, 1)) == [("ok", "7 lines, up to step 5")]


@pytest.mark.parametrize(
    ("steps", "saved", "said"),
    [
        ((5, 10), 0, "1 logged step is missing: 1"),
        ((1, 10, 15), 0, "1 logged step is missing: 5"),
        ((1, 5, 20, 30), 0, "3 logged steps are missing: 10 to 15, and 1 more further on"),
        ((1, 5), 20, "3 logged steps are missing: 10 to 20"),
    ],
)
def test_gaps(run: RunFolder, steps: tuple[int, ...], saved: int, said: str) -> None:
    write_lines(run.metrics, train_lines(*steps))
    assert found(run, logged(run, 5), saved) == [("damaged", said)]


def test_how_often_was_logged_is_followed_over_the_segments(run: RunFolder) -> None:
    def resumed(from_step: int, **changes: tuple[int, int]) -> None:
        recorded = [ConfigChange(f"training.{key}", *values) for key, values in changes.items()]
        append_segment(run.segments, Segment(from_step, changes=tuple(recorded)))

    resumed(0)
    resumed(20, log_every=(10, 5))
    write_lines(run.metrics, train_lines(1, 10, 20, 25, 30))
    assert found(run, logged(run, 5)) == [("ok", "5 lines, up to step 30")]
    assert found(run, logged(run, 5), saved=35)[0][0] == "damaged"
    resumed(10)  # from before the change, which so is undone
    write_lines(run.metrics, train_lines(1, 10, 20, 30))
    assert found(run, logged(run, 10)) == [("ok", "4 lines, up to step 30")]
    resumed(30, log_every=(10, 2))
    write_lines(run.metrics, train_lines(1, 10, 20, 30, 32, 34))
    assert found(run, logged(run, 2)) == [("ok", "6 lines, up to step 34")]
    write_lines(run.metrics, train_lines(1, 10, 20, 30, 34))
    assert found(run, logged(run, 2)) == [("damaged", "1 logged step is missing: 32")]
    resumed(0)  # from before all of it
    write_lines(run.metrics, train_lines(1, 10, 20))
    assert found(run, logged(run, 10)) == [("ok", "3 lines, up to step 20")]


def test_a_gap_is_no_damage_where_sinks_were_changed(run: RunFolder) -> None:
    change = ConfigChange("monitoring.sinks", ["console"], ["jsonl"])
    append_segment(run.segments, Segment(10, changes=(change,)))
    write_lines(run.metrics, train_lines(15, 20))
    assert found(run, logged(run, 5)) == [("note", "3 logged steps are missing: 1 to 10")]


def test_without_a_configuration_gaps_are_not_known(run: RunFolder) -> None:
    write_lines(run.metrics, train_lines(7, 90))
    assert found(run, None) == [("ok", "2 lines, up to step 90")]


def test_metrics_that_cannot_be_read(run: RunFolder) -> None:
    run.metrics.mkdir()
    assert found(run, None, 10) == [("damaged", "cannot be read (Is a directory)")]
