"""Logs that grow, are cut or replaced; steps that go back; and what cannot be opened."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.runs.trained_runs import train_line, val_line, write_lines
from ultrathink.insight.logs.files import Tail
from ultrathink.insight.logs.log import LogError, LogSignals, NotYetError
from ultrathink.insight.logs.opening import open_log
from ultrathink.insight.logs.order import StepOrder


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log"


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


# -- the tail of a file ----------------------------------------------------------------------------


@given(st.lists(st.text(alphabet="abc\nä", max_size=12), max_size=8))
def test_parts_that_are_appended_make_the_whole(
    tmp_path_factory: pytest.TempPathFactory, parts: list[str]
) -> None:
    path = tmp_path_factory.mktemp("tail") / "log"
    path.write_text("")
    tail = Tail(path)
    lines: list[str] = []
    for part in parts:
        append(path, part)
        new, is_replaced = tail.read()
        assert not is_replaced
        lines += new
    assert lines == "".join(parts).split("\n")[:-1]


@pytest.mark.parametrize(
    ("text", "is_replaced"),
    [
        ("one\n", False),  # cut
        ("one\nTWO\nthree\nfour\n", False),  # cut, and longer than it was: seen by its bytes
        ("one\ntwo\nthree\nfour\n", True),  # the same bytes and more: seen by its inode
    ],
)
def test_another_file_is_read_from_its_beginning(path: Path, text: str, is_replaced: bool) -> None:
    path.write_text("one\ntwo\nthree\n")
    tail = Tail(path)
    tail.read()
    other = path.with_name("other") if is_replaced else path
    other.write_text(text)
    other.replace(path)
    assert tail.read() == (text.splitlines(), True)
    assert tail.read() == ([], False)


def test_a_growing_table(path: Path) -> None:
    path.write_text("step,loss\n1,3\n2,2")
    log = open_log(path)
    assert log.poll().signals == [LogSignals(1, {"loss": 3.0})]
    append(path, ".5\n3,2\n")
    assert log.poll().signals == [LogSignals(2, {"loss": 2.5}), LogSignals(3, {"loss": 2.0})]
    path.write_text("step,loss\n1,9\n")
    news = log.poll()
    assert (news.is_replaced, news.signals) == (True, [LogSignals(1, {"loss": 9.0})])


# -- our own runs ----------------------------------------------------------------------------------


def experts_line(step: int) -> str:
    group = {
        "gini": [0.25, 0.5],
        "entropy_normalized": [0.9, 0.7],
        "confidence": [0.25, 0.75],
        "dead": [1, 2],
        "dropped": [0, 4],
        "load": [[6, 2, 0], [8, 0, None]],
    }
    return json.dumps({"step": step, "num_tokens": 8, "groups": {"skill": group}}) + "\n"


WORST = {  # of the layers
    "experts/skill/gini": 0.5,
    "experts/skill/entropy_normalized": 0.7,
    "experts/skill/confidence": 0.5,
    "experts/skill/dead": 3.0,
    "experts/skill/dropped": 4.0,
    "experts/skill/dropped_share": 0.25,
    "experts/skill/num_experts": 5.0,
    "experts/skill/even_load": 3.2,
}


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """The folder of a run of two steps."""
    folder = tmp_path / "runs/demo"
    folder.mkdir(parents=True)
    lines = [train_line(1, 3.0), train_line(2, 2.5), val_line(2, 2.75)]
    write_lines(folder / "metrics.jsonl", lines)
    (folder / "experts.jsonl").write_text(experts_line(1) + experts_line(2))
    (folder / "config.yaml").write_text("training: {max_steps: 12}\n")
    return folder


def test_a_run_is_read_with_its_experts(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo.parents[1])
    log = open_log("demo")  # by its name
    assert (log.format, log.total_steps) == ("run folder", 12)
    first, second, third = log.signals()
    assert first.values["loss"] == 3.0
    for signals in (first, second):
        assert WORST.items() <= signals.values.items()
    assert third.values["val_loss"] == 2.75
    assert not any(name.startswith("experts/") for name in third.values)
    with pytest.raises(LogError, match="the columns of a run folder are known"):
        open_log(demo, {"loss": "x"})


def test_alarms_that_a_run_raised_itself_are_counted(demo: Path) -> None:
    spike = {"step": 2, "began": 1, "kind": "loss_spike", "subject": "", "severity": "medium"}
    graver, slow = {**spike, "severity": "high"}, {**spike, "kind": "slow_step", "severity": "info"}
    log = open_log(demo)
    notes = []
    for lines in ([slow], [slow, spike, graver]):
        write_lines(demo / "events.jsonl", lines)
        list(log.signals())
        notes.append(log.notes)
    assert notes[0] == []
    assert "raised 1 alarm; see events.jsonl" in notes[1][0]


def test_a_run_that_grows_and_is_cut_by_a_resume(demo: Path) -> None:
    log = open_log(demo)
    assert len(log.poll().signals) == 3
    append(demo / "metrics.jsonl", json.dumps(train_line(3, 2.0)) + "\n")
    assert ["loss" in s.values for s in log.poll().signals] == [True]
    append(demo / "experts.jsonl", experts_line(3))  # late, so they come alone
    assert log.poll().signals == [LogSignals(3, WORST)]
    write_lines(demo / "metrics.jsonl", [train_line(1, 3.0)])
    news = log.poll()
    assert (news.is_replaced, [s.step for s in news.signals]) == (True, [1])


# -- the order of steps ----------------------------------------------------------------------------


def order_of(*records: tuple[int, str]) -> list[tuple[int | None, int]]:
    """What each record undid, and its step; its value is another one each time."""
    order = StepOrder()
    taken = []
    for number, (step, name) in enumerate(records):
        found = order.take(step, {name: float(number)})
        assert found is not None
        taken.append((order.undone, found))
    return taken


T, V = "loss", "val_loss"


@pytest.mark.parametrize(
    ("records", "taken"),
    [
        # A validation at the same step is no step back,
        ([(1, T), (2, T), (2, V), (3, T)], [(None, 1), (None, 2), (None, 2), (None, 3)]),
        # a resume undoes what lies beyond, and after it validations come again,
        (
            [(1, T), (5, T), (5, V), (3, T), (5, T), (5, V)],
            [(None, 1), (None, 5), (None, 5), (2, 3), (None, 5), (None, 5)],
        ),
        # a step that is repeated was undone,
        ([(2, T), (2, T)], [(None, 2), (1, 2)]),
        # and a validation that is late is no resume.
        ([(1, V), (9, T), (5, V), (10, T)], [(None, 1), (None, 9), (None, 9), (None, 10)]),
    ],
)
def test_which_steps_were_undone(
    records: list[tuple[int, str]], taken: list[tuple[int | None, int]]
) -> None:
    assert order_of(*records) == taken


@given(st.lists(st.tuples(st.integers(0, 20), st.sampled_from(["loss", "val_loss", "lr"]))))
def test_steps_of_a_run_only_go_back_where_they_were_undone(records: list[tuple[int, str]]) -> None:
    order, run, last = StepOrder(), 1, 0
    for number, (step, name) in enumerate(records):
        try:
            found = order.take(step, {name: float(number)})
        except LogError:  # several writers
            return
        assert found is not None
        if order.run > run:
            run, last = order.run, found
        if order.undone is not None:
            assert found <= last
            last = min(last, order.undone)
        assert found >= last
        last = found


def test_several_writers_are_refused_and_several_resumes_are_not() -> None:
    order = StepOrder()
    for number, step in enumerate([10, 20, 30, 20, 30, 40, 50, 60, 70, 70, 80]):
        order.take(step, {"loss": float(number)})
    for number, step in enumerate([90, 90, 100]):
        order.take(step, {"loss": float(-number)})
    with pytest.raises(LogError, match=r"several processes.*--columns run=COLUMN.*: 70, 90, 100"):
        order.take(100, {"loss": 0.5})


# -- what cannot be opened -------------------------------------------------------------------------

PACKED = gzip.compress(b"step,loss\n1,2\n", mtime=0)


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (b" \n\n", NotYetError, "is empty: there is nothing to watch yet"),
        (b"\1\0\0\1", LogError, "is a binary file, no training log; known are"),
        (PACKED, LogError, "is compressed by gzip.*decompress it first: gunzip"),
        ("step,loss\n1,2\n".encode("utf-16"), LogError, "UTF-16; write it in UTF-8"),
        (b"Once upon a time, there was a model.\n", NotYetError, "no training log that is known"),
    ],
)
def test_what_is_no_log_is_said(
    path: Path, data: bytes, kind: type[LogError], message: str
) -> None:
    path.write_bytes(data)
    with pytest.raises(kind, match=message):
        open_log(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("trian.csv", r"no file .*trian.csv' and no run.*'train.csv'"),
        ("nowhere/log", r"there is no folder .*nowhere' either"),
        ("", r"a folder without metrics.jsonl.*holds train.csv"),
    ],
)
def test_what_is_not_there_is_said(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "train.csv").write_text("")
    with pytest.raises(NotYetError, match=message):
        open_log(tmp_path / name)
