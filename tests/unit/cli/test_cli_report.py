"""``ultrathink report``: where it writes, and what it prints."""

import json
from pathlib import Path

import pytest

from tests.unit.cli.conftest import Say
from tests.unit.runs.trained_runs import train_line, write_lines


@pytest.fixture(autouse=True)
def two_runs(place: Path) -> None:
    """A run that was only begun, and one of three logged steps."""
    for name in ("fresh", "demo"):
        (place / "runs" / name).mkdir()
        (place / "runs" / name / "config.yaml").write_text("training: {max_steps: 3}\n")
    lines = [train_line(step, 4 - step, tokens=8 * step) for step in (1, 2, 3)]
    write_lines(place / "runs/demo/metrics.jsonl", lines)


def test_the_page_lies_in_the_run_or_where_it_is_wanted(say: Say) -> None:
    assert say("report", "demo", "--out", "page.html").splitlines()[-1].startswith("page.html  (")
    assert Path("page.html").stat().st_size > 10_000
    assert not Path("runs/demo/report.html").exists()
    out = say("report", "demo")
    assert out.splitlines()[-1].startswith("runs/demo/report.html  (")
    page = Path("runs/demo/report.html").read_text()
    assert page.lstrip().startswith("<!DOCTYPE html>")
    assert "<title>demo: training report</title>" in page
    say("report", "runs/demo")  # again, over the first


def test_what_a_program_sees(say: Say) -> None:
    Path("runs/demo/decisions.jsonl").write_text(
        '{"step": 2, "rule": "spike", "action": "skip_batch", "before": NaN, '
        '"audit": {"mean": -0.2, "low": -0.3, "high": -0.1}}\ntorn\n'
    )
    out = say("report", "demo", "--json")
    assert out.count("\n") == 1
    assert "NaN" not in out
    found = json.loads(out)
    assert found["file"] == "runs/demo/report.html"
    assert (found["run"], found["step"], found["total_steps"]) == ("demo", 3, 3)
    assert (found["tokens"], found["train_loss"]) == (24, 1.0)
    assert found["decisions"][0]["audit"]["verdict"] == "helped"
    assert found["decisions"][0]["before"] is None
    assert "decisions.jsonl: 1 line is damaged and left out." in found["notes"]
    assert {"events", "phases", "forecast", "forecasts", "experts"} <= found.keys()


def test_a_run_without_metrics_has_a_page_that_says_so(say: Say) -> None:
    assert "nothing was logged yet" in say("report", "fresh")
    assert "Nothing was logged yet" in Path("runs/fresh/report.html").read_text()
