"""Lines of metrics that are torn, missing, twice there or out of order."""

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


def logged(run: RunFolder, every: int) -> Config:
    return run.read_config().replace({"training.log_every": every}, origin="test")


def found(run: RunFolder, config: Config | None, *lines: Any, saved: int = 0) -> list[Any]:
    """The findings on these lines; a number is a training step."""
    rows = [train_line(one, 3.0) if isinstance(one, int) else one for one in lines]
    write_lines(run.metrics, rows)
    return list(check_metrics(run, config, saved))


def damaged(said: str) -> list[tuple[str, str]]:
    return [("damaged", said)]


CASES: list[tuple[int, int, list[Any], list[tuple[str, str]]]] = [
    (5, 12, [1, 5, 10, val_line(10, 2.0), 12], [("ok", "5 lines, up to step 12")]),
    (
        1,
        0,
        [1, "{\n", 2, '{"step": 3\n', "\n", 3, "{"],
        [
            ("damaged", "3 lines (2, 4, 5) cannot be read"),
            ("note", "its last line is torn, as by a crash; a resume drops it"),
        ],
    ),
    (1, 0, [1, 2, 3, 3, 4, 2, 3, 4], damaged("line 4 (step 3) follows step 3, and 1 more like it")),
    (5, 0, [5, 10], damaged("1 logged step is missing: 1")),
    (5, 0, [1, 10, 15], damaged("1 logged step is missing: 5")),
    (
        5,
        0,
        [1, 5, 20, 30],
        damaged("3 logged steps are missing: 10 to 15, and 1 more further on"),
    ),
    (5, 20, [1, 5], damaged("3 logged steps are missing: 10 to 20")),
]


@pytest.mark.parametrize(("every", "saved", "lines", "expected"), CASES)
def test_each_kind_of_damage_is_named(
    run: RunFolder, every: int, saved: int, lines: list[Any], expected: list[tuple[str, str]]
) -> None:
    assert found(run, logged(run, every), *lines, saved=saved) == expected


def test_metrics_that_are_missing_or_cannot_be_read(run: RunFolder) -> None:
    config = run.read_config()
    assert check_metrics(run, config, 0) == [("note", "there is none yet")]
    assert check_metrics(run, config, 10) == damaged("is missing")
    silent = config.replace({"monitoring.sinks": ["console"]}, origin="test")
    assert check_metrics(run, silent, 10) == []
    assert found(run, None, 7, 90) == [("ok", "2 lines, up to step 90")]  # gaps are not known
    run.metrics.unlink()
    run.metrics.mkdir()
    assert check_metrics(run, None, 10) == damaged("cannot be read (Is a directory)")


def test_a_rollback_explains_why_steps_go_back(run: RunFolder) -> None:
    steps, change = (1, 2, 3, 4, 3, 4, 5), {"id": None, "step": 4, "action": "rollback"}
    for unrelated in (
        {"action": "clip", "before": 4, "after": 2},
        {**change, "before": 4, "after": 3},
    ):
        write_lines(run.decisions, ["torn\n", unrelated])
        assert found(run, logged(run, 1), *steps)[0][0] == "damaged"
    write_lines(run.decisions, [{**change, "before": 4, "after": 2}])
    assert found(run, logged(run, 1), *steps) == [("ok", "7 lines, up to step 5")]


def test_how_often_was_logged_is_followed_over_the_segments(run: RunFolder) -> None:
    def resumed(from_step: int, **changes: tuple[int, int]) -> None:
        recorded = [ConfigChange(f"training.{key}", *values) for key, values in changes.items()]
        append_segment(run.segments, Segment(from_step, changes=tuple(recorded)))

    resumed(0)
    resumed(20, log_every=(10, 5))
    steps = (1, 10, 20, 25, 30)
    assert found(run, logged(run, 5), *steps) == [("ok", "5 lines, up to step 30")]
    assert found(run, logged(run, 5), *steps, saved=35)[0][0] == "damaged"
    resumed(10)  # from before the change, which so is undone
    assert found(run, logged(run, 10), 1, 10, 20, 30) == [("ok", "4 lines, up to step 30")]
    resumed(30, log_every=(10, 2))
    steps = (1, 10, 20, 30, 32, 34)
    assert found(run, logged(run, 2), *steps) == [("ok", "6 lines, up to step 34")]
    missing = damaged("1 logged step is missing: 32")
    assert found(run, logged(run, 2), 1, 10, 20, 30, 34) == missing
    resumed(0)  # from before all of it
    assert found(run, logged(run, 10), 1, 10, 20) == [("ok", "3 lines, up to step 20")]


def test_a_gap_is_no_damage_where_sinks_were_changed(run: RunFolder) -> None:
    change = ConfigChange("monitoring.sinks", ["console"], ["jsonl"])
    append_segment(run.segments, Segment(10, changes=(change,)))
    note = [("note", "3 logged steps are missing: 1 to 10")]
    assert found(run, logged(run, 5), 15, 20) == note
