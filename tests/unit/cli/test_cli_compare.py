"""``ultrathink compare``, as a person and as a program sees it."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.cli.conftest import Say, without_codes
from tests.unit.runs.trained_runs import make_run, train_line, val_line, write_lines
from ultrathink.cli.main import main
from ultrathink.config import load_config
from ultrathink.config.overrides import flatten
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.segments import ConfigChange, Segment, append_segment

NUM_VALUES = len(flatten(load_config("debug").model_dump(mode="json")))


def with_course(run: RunFolder, loss: float, steps: int = 4, **values: Any) -> RunFolder:
    lines = [train_line(step, loss / step, **values) for step in range(1, steps + 1)]
    write_lines(run.metrics, [*lines, val_line(steps, loss)])
    run.manifest.write_text(json.dumps({"commit": f"{loss:.0f}" * 40, "python": "3.11.7"}))
    return run


@pytest.fixture
def two(place: Path) -> None:
    """The runs ``a`` and ``b``."""
    with_course(make_run(Path("runs"), "a"), 4.0)
    with_course(make_run(Path("runs"), "b", total=30), 3.0)


def test_everything_side_by_side(two: None, say: Say) -> None:
    assert say("compare", "a", "b") == (
        f"Configuration: 1 of {NUM_VALUES} values differ (run.name left out)\n"
        "                      a   b\n"
        "  training.max_steps  20  30\n"
        "\n"
        "Manifest: what the runs were made with\n"
        "          a             b\n"
        "  commit  444444444444  333333333333\n"
        "\n"
        "Curves: train loss (mean of a stretch), bits/byte (last validation in it)\n"
        "  up to step  loss a       b  bits/byte a       b\n"
        "           1  4.0000  3.0000            -       -\n"
        "           2  2.0000  1.5000            -       -\n"
        "           3  1.3333  1.0000            -       -\n"
        "           4  1.0000  0.7500       2.0000  1.5000\n"
        "\n"
        "  train loss over 4 steps, from 0.750 (low) to 4.000 (high)\n"
        "  a  " + " " * 17 + "█" * 18 + "▅" * 18 + "▃" * 17 + "▂\n"
        "  b  " + " " * 17 + "▇" * 18 + "▄" * 18 + "▂" * 17 + "▁\n"
        "\n"
        "Figures, and the difference to the first run\n"
        "                                                a            b  difference\n"
        "  steps                                         4            4           0\n"
        "  tokens                                    2,048        2,048           0\n"
        "  train loss, last                         1.0000       0.7500     -0.2500\n"
        "  train loss, mean of the last tenth       1.0000       0.7500     -0.2500\n"
        "  val loss, last                           4.0000       3.0000     -1.0000\n"
        "  bits/byte, last                          2.0000       1.5000     -0.5000\n"
        "  val loss, best                      4.0000 at 4  3.0000 at 4     -1.0000\n"
        "  bits/byte, best                     2.0000 at 4  1.5000 at 4     -0.5000\n"
    )
    back = say("compare", "b", "a")
    assert "  train loss, last                         0.7500       1.0000     +0.2500\n" in back


def test_json_has_all_of_it(two: None, say: Say) -> None:
    found = json.loads(say("compare", "a", "runs/b", "--json"))
    assert [(run["name"], run["path"]) for run in found["runs"]] == [
        ("a", "runs/a"),
        ("b", "runs/b"),
    ]
    assert found["config"] == [{"key": "training.max_steps", "values": [20, 30]}]
    assert found["manifest"] == [{"key": "commit", "values": ["4" * 40, "3" * 40]}]
    curves = found["curves"]
    assert curves["axis"] == "step"
    assert curves["stretches"][-1] == {
        "begin": 3,
        "end": 4,
        "train_loss": [1.0, 0.75],
        "bits_per_byte": [2.0, 1.5],
    }
    assert curves["agreement"][0]["train"] == {
        "identical": False,
        "common_steps": 4,
        "equal_steps": 0,
        "last_equal_step": None,
        "first_different_step": 1,
    }
    assert found["summary"]["best_bits_per_byte"] == {
        "values": [2.0, 1.5],
        "differences": [0.0, -0.5],
        "steps": [4, 4],
    }


def test_what_was_not_finite_is_null_in_json(two: None, say: Say) -> None:
    run = make_run(Path("runs"), "c")
    write_lines(run.metrics, [train_line(1, 4.0), train_line(2, None)])
    found = json.loads(say("compare", "a", "c", "--json"))
    assert found["curves"]["stretches"][1]["train_loss"] == [2.0, None]
    assert found["summary"]["train_loss"]["differences"] == [0.0, None]
    lines = say("compare", "a", "c").splitlines()
    assert "           2  2.0000     nan" in lines


def test_a_terminal_gets_a_plot_in_colours(two: None, terminal: Say) -> None:
    text = terminal("compare", "a", "b")
    assert "\x1b[36m━ a" in text
    assert "\x1b[33m━ b" in text
    plain = without_codes(text)
    [top] = [line for line in plain if line.startswith("  4.000 │")]
    [axis] = [line for line in plain if line.startswith("        └")]
    assert len(top) == len(axis) < 60
    assert any(line.startswith("         train loss  ━ a  ━ b ") for line in plain)
    assert max(map(len, plain)) < 80


def test_where_the_encoding_has_no_bars_there_is_no_plot(
    two: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert main(["compare", "a", "b"]) == 0
    text = raw.getvalue().decode("ascii")
    assert "Figures, and" in text
    assert not any(sign in text for sign in ("(low)", "\\u"))


def test_how_long_curves_are_equal(two: None, say: Say) -> None:
    run = with_course(make_run(Path("runs"), "c"), 4.0)
    lines = run.metrics.read_text().splitlines()
    lines[2] = lines[2].replace("1.333", "1.334")
    write_lines(run.metrics, [f"{line}\n" for line in lines])
    out = say("compare", "a", "c")
    with_course(make_run(Path("runs"), "same"), 4.0)
    assert "a and same: all 4 logged losses are equal (identical)" in say("compare", "a", "same")
    assert "the logged losses are equal up to step 2 and differ from step 3 on" in out
    with_course(make_run(Path("runs"), "d"), 4.0, steps=3)
    assert "all 3 logged losses are equal at the steps that both have" in say("compare", "a", "d")


def test_metrics_that_only_some_have_are_listed_of_experts_group_by_group(
    two: None, say: Say
) -> None:
    figures = {f"experts/{group}/{name}": 0.5 for group in ("skill", "meta")
               for name in ("gini", "dead", "dropped")}  # fmt: skip
    for name in ("c", "d"):
        with_course(make_run(Path("runs"), name), 3.0, aux_balance=0.5, **figures)
    out = say("compare", "a", "c", "d")
    assert "  up to step  loss a       c       d  bits/byte a       c       d\n" in out
    assert "  only c and d have the metric train aux_balance\n" in out
    assert "  only c and d have the metrics train experts/meta/*\n" in out
    assert out.count("experts/") == 2
    answer = json.loads(say("compare", "a", "c", "d", "--json"))
    assert answer["curves"]["lone_metrics"]["train experts/skill/gini"] == ["c", "d"]


def test_what_was_changed_on_resuming_is_reported(two: None, say: Say) -> None:
    change = ConfigChange("training.clip", 1.0, 0.5)
    other = ConfigChange("training.log_every", 10, 1, felt=False)
    append_segment(Path("runs/b/segments.jsonl"), Segment(2, changes=(change, other)))
    out = say("compare", "a", "b")
    assert "Changed on resuming\n  b after step 2: training.clip: 1.0 -> 0.5\n" in out
    found = json.loads(say("compare", "a", "b", "--json"))
    assert found["runs"][1]["segments"][0]["changes"] == [
        {"key": "training.clip", "before": 1.0, "after": 0.5, "felt": True},
        {"key": "training.log_every", "before": 10, "after": 1, "felt": False},
    ]


def test_runs_of_one_name_are_distinguished_by_their_folders(two: None, say: Say) -> None:
    with_course(make_run(Path("other"), "a"), 3.0)
    found = json.loads(say("compare", "a", "other/a/", "--json"))
    assert [run["name"] for run in found["runs"]] == ["a", "other/a"]
