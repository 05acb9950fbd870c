"""``ultrathink report``: where it writes, what it prints, and what it refuses."""

import json
from pathlib import Path

import pytest

from ultrathink.cli.main import main

Out = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run that was only begun, and one of three logged steps."""
    monkeypatch.chdir(tmp_path)
    for name in ("fresh", "demo"):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("training: {max_steps: 3}\n")
    lines = [
        {"step": step, "split": "train", "time": step, "loss": 4 - step, "tokens": 8 * step}
        for step in (1, 2, 3)
    ]
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (tmp_path / "runs/demo/metrics.jsonl").write_text(text)
    return tmp_path


def report(capsys: Out, *words: str, status: int = 0) -> str:
    assert main(["report", *words]) == status
    out, err = capsys.readouterr()
    assert (out if status else err) == ""
    return err if status else out


def test_the_page_lies_in_the_run(place: Path, capsys: Out) -> None:
    out = report(capsys, "demo")
    assert out.splitlines()[-1].startswith("runs/demo/report.html  (")
    page = (place / "runs/demo/report.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "<title>demo: training report</title>" in page
    report(capsys, "runs/demo")  # again, over the first


def test_the_page_lies_where_it_is_wanted(place: Path, capsys: Out) -> None:
    assert report(capsys, "demo", "--out", "page.html").splitlines()[-1].startswith("page.html  (")
    assert (place / "page.html").stat().st_size > 10_000
    assert not (place / "runs/demo/report.html").exists()


def test_what_a_program_sees(place: Path, capsys: Out) -> None:
    (place / "runs/demo/decisions.jsonl").write_text(
        '{"step": 2, "rule": "spike", "action": "skip_batch", "before": NaN, '
        '"audit": {"mean": -0.2, "low": -0.3, "high": -0.1}}\ntorn\n'
    )
    out = report(capsys, "demo", "--json")
    assert out.count("\n") == 1

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    found = json.loads(out, parse_constant=refuse)
    assert found["file"] == "runs/demo/report.html"
    assert (found["run"], found["step"], found["total_steps"]) == ("demo", 3, 3)
    assert (found["tokens"], found["train_loss"]) == (24, 1.0)
    assert found["decisions"][0]["audit"]["verdict"] == "helped"
    assert found["decisions"][0]["before"] is None
    assert "decisions.jsonl: 1 line is damaged and left out." in found["notes"]
    assert {"events", "phases", "forecast", "forecasts", "experts"} <= found.keys()


def test_a_run_without_metrics_has_a_page_that_says_so(place: Path, capsys: Out) -> None:
    out = report(capsys, "fresh")
    assert "nothing was logged yet" in out
    assert "Nothing was logged yet" in (place / "runs/fresh/report.html").read_text()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["dmeo"], "there is no run 'dmeo'. Did you mean 'demo'?"),
        (["demo", "--out", "nowhere/page.html"], "--out: there is no folder 'nowhere'"),
        (["demo", "--out", "runs"], "--out: 'runs' is a folder; name a file in it"),
        (["runs"], "runs is not a run folder"),
        ([], "RUN"),
    ],
)
def test_mistakes_are_told_in_a_sentence(capsys: Out, words: list[str], told: str) -> None:
    assert told in report(capsys, *words, status=2)


def test_the_command_is_listed(capsys: Out) -> None:
    assert main(["--help"]) == 0
    assert "report      write a page that explains a run" in capsys.readouterr().out
