"""``ultrathink watch``, as a person and as a program sees it."""

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.stress.process import Session
from tests.unit.cli.conftest import Say


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


def test_what_a_person_sees(log: Path, say: Say) -> None:
    out = say("watch", "log.csv")
    lines = out.splitlines()
    assert lines[0] == "log.csv  CSV"
    assert lines[1] == "  600 steps logged, 1 to 600"
    assert lines[2] == "  signals: loss"
    # The mark stands on the axis below the dots of its step.
    place, _, marks = next(line for line in lines if "▲" in line).partition("└")
    assert marks.index("▲") == pytest.approx(399 / 600 * len(marks), abs=1.5)
    assert any(dots[len(place) + 1 :].strip() for dots in lines if "│" in dots)
    spikes = [line.split()[0] for line in lines if "loss_spike" in line]
    assert spikes[0] == "400"
    assert "phases: INITIALIZATION" in out
    assert "forecast: loss" in out


def test_what_a_program_sees(log: Path, say: Say) -> None:
    out = say("watch", "log.csv", "--json")
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


def test_nothing_found_is_said(place: Path, say: Say) -> None:
    (place / "log").write_text("step,loss\n1,2\n2,1.5\n")
    assert "No events in the logged steps." in say("watch", "log")


def test_a_picture(log: Path, place: Path, say: Say) -> None:
    pytest.importorskip("matplotlib")
    out = say("watch", "log.csv", "--plot", "course.png")
    assert "The curve with events and phases: course.png" in out
    assert (place / "course.png").read_bytes().startswith(b"\x89PNG")


# -- following -------------------------------------------------------------------------------------

Follow = Callable[..., Session]


@pytest.fixture
def follow(place: Path) -> Iterator[Follow]:
    """Starts the command in a process of its own."""
    started: list[Session] = []

    def start(*words: str) -> Session:
        started.append(Session(place, place, "watch", *words, "--follow"))
        return started[-1]

    yield start
    for session in started:
        session.kill()


def interrupted(session: Session) -> bool:
    """Whether it ends by Ctrl-C, and says so."""
    session.signal_all(signal.SIGINT)
    session.wait_until(lambda: False)
    return session.process.returncode == 130 and "interrupted" in session.stderr


def test_events_are_shown_as_the_log_grows(place: Path, follow: Follow) -> None:
    def events() -> list[dict[str, Any]]:
        return [json.loads(line) for line in session.stdout.splitlines()]

    session = follow("log.csv", "--json")
    assert session.wait_until(lambda: "waiting: there is no file 'log.csv'" in session.stderr)
    log = place / "log.csv"
    log.write_text("step,loss\n" + rows(1, 401, 400))
    time.sleep(0.7)
    with log.open("a") as file:
        file.write(rows(401, 500, 400))
    assert session.wait_until(lambda: '"loss_spike"' in session.stdout)
    assert next(e for e in events() if e["kind"] == "loss_spike")["step"] == 400

    log.write_text("step,loss\n" + rows(1, 300))  # cut: shown events are not repeated
    assert session.wait_until(lambda: "was cut or replaced" in session.stderr)
    with log.open("a") as file:
        file.write(rows(300, 700, 400, 620))
    assert session.wait_until(lambda: '"step": 620' in session.stdout)
    shown = [(event["step"], event["kind"], event["severity"]) for event in events()]
    assert len(shown) == len(set(shown))
    assert interrupted(session)


def test_phases_are_shown_to_people_with_the_names_of_runs(log: Path, follow: Follow) -> None:
    spiky, healthy = rows(1, 601, 400).splitlines(), rows(1, 601).splitlines()
    both = [f"a,{one}\nb,{other}\n" for one, other in zip(spiky, healthy, strict=True)]
    log.write_text("run,step,loss\n" + "".join(both))
    session = follow("log.csv")
    for text in (
        "400  a  high      loss_spike: ",
        "  a  phase CONVERGING",
        "  b  phase CONVERGING",
    ):
        assert session.wait_until(lambda text=text: text in session.stdout), session.stdout
    assert "b  high" not in session.stdout
    log.unlink()
    assert session.wait_until(lambda: "waiting: log.csv is gone" in session.stderr)
    log.write_text("step,loss\n" + rows(1, 10))
    assert session.wait_until(lambda: "read from its beginning" in session.stderr)
    assert interrupted(session)
