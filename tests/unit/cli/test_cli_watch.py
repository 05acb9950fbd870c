"""``ultrathink watch``, as a person and as a program sees it."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ultrathink.cli.main import main

Out = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def loss_at(step: int, spikes: tuple[int, ...]) -> float:
    loss = 3.0 + 2.0 * math.exp(-step / 300) + 0.02 * math.sin(12.9898 * step)
    return loss + 4.0 * any(spike <= step < spike + 20 for spike in spikes)


def rows(begin: int, end: int, *spikes: int) -> str:
    return "".join(f"{step},{loss_at(step, spikes):.5f}\n" for step in range(begin, end))


@pytest.fixture
def log(place: Path) -> Path:
    """A healthy log of 600 steps, but for a spike of twenty."""
    path = place / "log.csv"
    path.write_text("step,loss\n" + rows(1, 601, 400))
    return path


def watch(capsys: Out, *words: str, status: int = 0) -> str:
    assert main(["watch", *words]) == status
    out, err = capsys.readouterr()
    assert (out if status else err) == ""
    return err if status else out


def test_what_a_person_sees(log: Path, capsys: Out) -> None:
    out = watch(capsys, "log.csv")
    lines = out.splitlines()
    assert lines[0] == "log.csv  CSV"
    assert lines[1] == "  600 steps logged, 1 to 600"
    assert lines[2] == "  signals: loss"
    bars, marks = lines[5], lines[6]
    assert "█" in bars
    # The mark stands below the bar of its step.
    assert marks.index("▲") == pytest.approx(2 + 399 / 600 * (len(bars) - 2), abs=1.5)
    spikes = [line.split()[0] for line in lines if "loss_spike" in line]
    assert spikes[0] == "400"
    assert "phases: INITIALIZATION" in out
    assert "forecast: loss" in out


def test_what_a_program_sees(log: Path, capsys: Out) -> None:
    out = watch(capsys, "log.csv", "--json")
    found = json.loads(out)
    assert out.count("\n") == 1
    assert set(found) == {"log", "events", "phases", "forecast"}
    assert found["log"]["num_steps"] == 600
    assert found["log"]["format"] == "CSV"
    assert (found["log"]["first_step"], found["log"]["last_step"]) == (1, 600)
    assert found["log"]["signals"] == ["loss"]
    for event in found["events"]:
        assert {"step", "kind", "severity", "message"} <= event.keys()
    alarms = [e for e in found["events"] if e["severity"] in ("medium", "high", "critical")]
    assert (400, "loss_spike") in [(e["step"], e["kind"]) for e in alarms]
    assert not [e for e in alarms if e["step"] < 400]
    for phase in found["phases"]:
        assert {"phase", "from_step", "to_step"} <= phase.keys()
    assert found["forecast"]["step"] == 1200


def test_nothing_found_is_said(place: Path, capsys: Out) -> None:
    (place / "log").write_text("step,loss\n1,2\n2,1.5\n")
    assert "Nothing was found." in watch(capsys, "log")


def test_a_picture(log: Path, place: Path, capsys: Out) -> None:
    pytest.importorskip("matplotlib")
    assert "The curve with events and phases: course.png" in watch(
        capsys, "log.csv", "--plot", "course.png"
    )
    assert (place / "course.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.csv"], "there is no file 'none.csv' and no run of that name."),
        (["log.cvs"], "Did you mean 'log.csv'?"),
        (["empty"], "empty is empty: there is nothing to watch yet."),
        (["folder"], "folder is a folder without metrics.jsonl"),
        (["prose"], "prose is no training log that is known here"),
        (["binary"], "binary is a binary file"),
        (["unknown"], "seen: a, b. Name them: --columns loss=COLUMN,step=COLUMN"),
        (["log.csv", "--columns", "loss=lss"], "log.csv has no column 'lss'. Did you mean 'loss'?"),
        (["log.csv", "--columns", "loss"], "'loss' is not SIGNAL=COLUMN"),
        (["log.csv", "--plot", "course.txt"], "'course.txt' does not end in .png, .svg, .pdf"),
        (["log.csv", "--plot", "no/course.png"], "there is no folder 'no'; make it first"),
        ([], "the following arguments are required: FILE"),
    ],
)
def test_a_mistake_is_one_message(
    log: Path, place: Path, capsys: Out, words: list[str], message: str
) -> None:
    (place / "empty").write_text("")
    (place / "folder").mkdir()
    (place / "prose").write_text("Call me Ishmael.\nSome years ago, never mind how long.\n")
    (place / "binary").write_bytes(b"\0\1\2")
    (place / "unknown").write_text("a,b\n1,2\n")
    err = watch(capsys, *words, status=2)
    assert message in err
    assert err.count("error:") == 1
    assert "Traceback" not in err


# -- following -------------------------------------------------------------------------------------


class Follower:
    """The command in a process of its own."""

    def __init__(self, *words: str) -> None:
        with Path("out").open("w") as out, Path("err").open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ultrathink", "watch", *words, "--follow"],
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def until(self, test: Callable[[str, str], bool]) -> None:
        end = time.monotonic() + 60
        while not test(Path("out").read_text(), Path("err").read_text()):
            assert self.process.poll() is None, Path("err").read_text()
            assert time.monotonic() < end, (Path("out").read_text(), Path("err").read_text())
            time.sleep(0.05)

    def interrupt(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout=30)


@pytest.fixture
def follow(place: Path) -> Iterator[Callable[..., Follower]]:
    started: list[Follower] = []

    def start(*words: str) -> Follower:
        started.append(Follower(*words))
        return started[-1]

    yield start
    for follower in started:
        if follower.process.poll() is None:
            os.killpg(follower.process.pid, signal.SIGKILL)
            follower.process.wait()


def events_in(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_events_are_told_as_they_come(place: Path, follow: Callable[..., Follower]) -> None:
    follower = follow("log.csv", "--json")
    follower.until(lambda out, err: "waiting: there is no file 'log.csv'" in err)
    log = place / "log.csv"
    log.write_text("step,loss\n" + rows(1, 401, 400))
    time.sleep(0.7)
    with log.open("a") as file:
        file.write(rows(401, 500, 400))
    follower.until(lambda out, err: '"loss_spike"' in out)
    (event, *_) = [e for e in events_in((place / "out").read_text()) if e["kind"] == "loss_spike"]
    assert event["step"] == 400
    told = len((place / "out").read_text().splitlines())

    log.write_text("step,loss\n" + rows(1, 300))  # cut: what was told is not told again
    follower.until(lambda out, err: "was cut or replaced" in err)
    with log.open("a") as file:
        file.write(rows(300, 700, 400, 620))
    follower.until(lambda out, err: '"step": 620' in out)
    steps = [e["step"] for e in events_in((place / "out").read_text())[told:]]
    assert 400 not in steps
    assert follower.interrupt() == 130


def test_a_person_is_told_of_phases_too(log: Path, follow: Callable[..., Follower]) -> None:
    follower = follow("log.csv")
    follower.until(lambda out, err: "loss_spike: " in out and "phase CONVERGING" in out)
    log.unlink()
    follower.until(lambda out, err: "waiting: log.csv is gone" in err)
    log.write_text("step,loss\n" + rows(1, 10))
    follower.until(lambda out, err: "read from its beginning" in err)
    assert follower.interrupt() == 130
    assert "interrupted" in Path("err").read_text()
