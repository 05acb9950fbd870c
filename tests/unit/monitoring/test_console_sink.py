"""The console: lines for a file, a bar for a person, and nothing that can end a run."""

import io
import logging
import math
import os
import pty
import re
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from tests.unit.monitoring.disks import fill, small_disk
from tests.unit.monitoring.screens import Clock, Terminal
from ultrathink import build_trainer, load_config
from ultrathink.monitoring import MetricRecord, RunInfo
from ultrathink.monitoring.console import ConsoleSink
from ultrathink.monitoring.preparation import PreparationDisplay
from ultrathink.monitoring.records import Note

SIMULATION = textwrap.dedent(
    """
    import sys, warnings
    from pathlib import Path
    from ultrathink.monitoring import MetricRecord, RunInfo
    from ultrathink.monitoring.console import ConsoleSink
    from ultrathink.monitoring.preparation import PreparationDisplay

    with PreparationDisplay() as display:
        display("tokenizing", 5, 10)
        display("tokenizing", 10, 10)
    sink = ConsoleSink()
    sink.open(RunInfo("demo", Path("runs/demo"), 50, 0, "4M parameters"))
    for step in range(1, 51):
        sink.progress(step)
        sink.write(MetricRecord(step, "train", 0.0, {"loss": 3.0}))
    warnings.warn("from a library")
    sink.message("look here", "warning")
    sink.write(MetricRecord(50, "val", 0.0, {"loss": 3.25, "bits_per_byte": 1.5}))
    sink.sample(50, "def f(", "x): [bold]")
    for note, _ in sink.take_notes():
        print(note)
    sink.close()
    print("the result")
    """
)


def opened(
    stream: IO[str],
    clock: Callable[[], float] = time.monotonic,
    total_steps: int = 100,
    start_step: int = 0,
) -> ConsoleSink:
    """The console of a run that begins."""
    sink = ConsoleSink(stream, clock)
    heading = "4M parameters\non a cpu"
    sink.open(RunInfo("demo", Path("runs/demo"), total_steps, start_step, heading))
    return sink


def train(step: int, **values: float) -> MetricRecord:
    return MetricRecord(step, "train", 0.0, {"loss": 3.0, "lr": 0.01, **values})


def val(step: int) -> MetricRecord:
    return MetricRecord(step, "val", 0.0, {"loss": 3.25, "bits_per_byte": 1.5, "ppl": 25.79})


def simulate(clock: Clock, sink: ConsoleSink, *, steps: int, seconds: float) -> None:
    for step in range(1, steps + 1):
        clock.now += seconds
        sink.progress(step)
        if step == 1 or step % 10 == 0:
            sink.write(train(step, tokens_per_sec=18_211.0))


# -- lines ------------------------------------------------------------------------------------


def test_a_file_gets_plain_lines() -> None:
    stream, clock = io.StringIO(), Clock()
    sink = opened(stream, clock)
    simulate(clock, sink, steps=100, seconds=0.5)
    sink.write(val(100))
    sink.message("look here", "warning")
    sink.message("all is well", "info")
    sink.sample(100, 'def f():\n    """', "Do it.\x1b[31m")
    sink.close()
    assert stream.getvalue() == textwrap.dedent(
        '''\
        demo: 4M parameters
        on a cpu
        saved in runs/demo
        step 1/100  loss 3.0000  lr 1.00e-02  tokens/s 18.2k
        step 10/100  loss 3.0000  lr 1.00e-02  tokens/s 18.2k  45s left
        step 20/100  loss 3.0000  lr 1.00e-02  tokens/s 18.2k  40s left
        step 30/100  loss 3.0000  lr 1.00e-02  tokens/s 18.2k  35s left
        step 40/100  loss 3.0000  lr 1.00e-02  tokens/s 18.2k  30s left
        step 50/100  loss 3.0000  lr 1.00e-02  tokens/s 18.2k  25s left
        step 60/100  loss 3.0000  lr 1.00e-02  tokens/s 18.2k  20s left
        step 70/100  loss 3.0000  lr 1.00e-02  tokens/s 18.2k  15s left
        step 80/100  loss 3.0000  lr 1.00e-02  tokens/s 18.2k  10s left
        step 90/100  loss 3.0000  lr 1.00e-02  tokens/s 18.2k  5s left
        step 100/100  loss 3.0000  lr 1.00e-02  tokens/s 18.2k  took 50s
        step 100/100  val loss 3.2500  bits/byte 1.500  perplexity 25.79
        warning: look here
        all is well
        sample after step 100:
            def f():
                """Do it.\ufffd[31m
        '''
    )


def test_lines_keep_their_distance_but_for_validation_and_the_last() -> None:
    stream, clock = io.StringIO(), Clock()
    sink = opened(stream, clock, total_steps=500)
    simulate(clock, sink, steps=500, seconds=1 / 64)  # 51 records in 8 seconds
    sink.write(val(500))
    lines = stream.getvalue().splitlines()[3:]
    shown = [line.split("  ")[0].removeprefix("step ") for line in lines]
    assert shown == ["1/500", "130/500", "260/500", "390/500", "500/500", "500/500"]


def test_a_length_and_a_phase_that_become_known_later_are_shown_from_then_on() -> None:
    stream, clock = io.StringIO(), Clock()
    sink = opened(stream, clock, total_steps=0)
    sink.phase("INITIALIZATION")
    for step, phase in ((1, "CONVERGING"), (10, "PLATEAU")):
        sink.progress(step)
        sink.write(train(step))
        sink.set_total_steps(40)
        sink.phase(phase)
        clock.now = 9.0
    assert stream.getvalue().splitlines()[3:] == [
        "step 1  loss 3.0000  lr 1.00e-02  phase first steps",
        "step 10/40  loss 3.0000  lr 1.00e-02  phase converging  30s left",
    ]


def test_a_resumed_run_says_from_where_and_a_loss_may_be_no_number() -> None:
    for stream in (io.StringIO(), Terminal()):
        sink = opened(stream, start_step=1200)
        sink.write(train(1, loss=math.nan, tokens_per_sec=math.inf))
        sink.close()
        assert "saved in runs/demo, resumed after step 1,200" in stream.getvalue()
        text = stream.text() if isinstance(stream, Terminal) else stream.getvalue()
        assert re.search(r"loss nan +lr 1.00e-02 +tokens/s inf", text)


def test_messages_below_the_configured_level_are_hidden(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level("INFO", "ultrathink")  # restored at the end
    words = ["monitoring.log_level=error", f"run.dir={tmp_path}"]
    build_trainer(load_config("debug", words)).close()
    assert logging.getLogger("ultrathink").level == logging.ERROR
    stream = io.StringIO()
    sink = opened(stream)
    for level, shown in (("INFO", {"news", "trouble"}), ("WARNING", {"trouble"}), ("ERROR", set())):
        caplog.set_level(level, "ultrathink")
        begin = stream.tell()
        sink.message("news", "info")
        sink.message("trouble", "warning")
        assert {line.rpartition(" ")[2] for line in stream.getvalue()[begin:].splitlines()} == shown


# -- the bar ----------------------------------------------------------------------------------


def shown_on_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    monkeypatch.setenv("COLUMNS", str(width))
    stream, clock = Terminal(), Clock()
    sink = opened(stream, clock)
    simulate(clock, sink, steps=50, seconds=0.5)
    sink.write(val(50))
    sink.message("look [bold]here[/]", "warning")
    sink.sample(50, "def f(", "x): [bold]\x1b[2J :smile:")
    clock.now += 1
    sink.progress(51)
    last_frame = stream.text()[-4 * width :]
    sink.close()
    return stream.text(), last_frame


@pytest.mark.parametrize("width", [40, 80, 120])
def test_the_bar_shows_where_the_run_stands(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text, frame = shown_on_terminal(width, monkeypatch)
    validated = "val loss 3.2500   bits/byte 1.500"
    assert "51/100  51%  25s left" in frame
    assert "loss 3.0000   lr 1.00e-02" in frame
    assert (f"tokens/s 18.2k   {validated}" in frame) is (width > 40)
    assert (f"step 50   {validated}   perplexity 25.79" in text) is (width > 40)
    assert "warning: look [bold]here[/]" in text
    assert "def f(x): [bold]\ufffd[2J :smile:" in text
    assert "sample after step 50" in text
    assert "\u2026" not in text  # a figure is shown whole or not at all
    assert max(map(len, re.split(r"[\r\n]", text))) <= min(width, 100)


def test_the_terminal_is_left_as_it_was() -> None:
    stream = Terminal()
    stderr, stdout = sys.stderr, sys.stdout
    num_threads = threading.active_count()
    sink = opened(stream)
    assert threading.active_count() == num_threads  # none that would compete with training
    assert "\x1b[?25l" in stream.getvalue()  # the cursor is hidden
    assert sys.stdout is stdout
    sink.close()
    sink.close()
    assert stream.getvalue().rstrip().endswith("\x1b[?25h")
    assert sys.stderr is stderr


def test_the_bar_is_redrawn_a_few_times_a_second_at_most() -> None:
    stream, clock = Terminal(), Clock()
    sink = opened(stream, clock, total_steps=10_000)
    simulate(clock, sink, steps=10_000, seconds=0.001)  # ten seconds
    assert stream.text().count("tokens/s") <= 52
    sink.close()


# -- streams that fail ------------------------------------------------------------------------


class Broken(Terminal):
    terminal = True

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        raise BrokenPipeError


@pytest.mark.parametrize("terminal", [True, False])
def test_a_reader_that_is_gone_is_reported_once_and_does_not_end_the_run(terminal: bool) -> None:
    stream = Broken()
    stream.terminal = terminal
    sink = opened(stream)
    ((note, level),) = sink.take_notes()
    assert note == (
        "the console cannot be written to (BrokenPipeError: ); training continues, and messages "
        "are in logs/run.log"
    )
    assert level == "warning"
    sink.progress(1)
    for each in (train(1), val(1)):
        sink.write(each)
    sink.message("a", "info")
    sink.sample(1, "a", "b")
    sink.close()
    assert sink.take_notes() == []


def test_a_console_that_works_again_is_reported(tmp_path: Path) -> None:
    with (
        small_disk(tmp_path / "disk") as disk,
        io.TextIOWrapper((disk / "log").open("wb"), line_buffering=True) as file,
    ):
        sink = opened(file)
        filler = fill(disk)
        notes: list[Note] = []
        while not notes:
            sink.message("x" * 500, "info")
            notes = sink.take_notes()
        assert "(OSError: [Errno 28] No space left on device)" in notes[0][0]
        filler.unlink()
        sink.message("seen", "info")
        assert sink.take_notes() == [("the console can be written to again", "info")]
        assert (disk / "log").read_text().splitlines()[-1] == "seen"


def run_simulation(stderr: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SIMULATION],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        timeout=60,
        check=False,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )


def test_a_closed_pipe_leaves_the_exit_status_alone() -> None:
    """The preparation finds the reader gone; the sink still knows, and says so."""
    reading, writing = os.pipe()
    os.close(reading)
    done = run_simulation(writing)
    os.close(writing)
    gone = "the console cannot be written to (BrokenPipeError: [Errno 32] Broken pipe)"
    notes, result = done.stdout.splitlines()
    assert notes.startswith(gone)
    assert (done.returncode, result) == (0, "the result")


def test_what_can_never_be_written_does_not_fail_again_at_the_end(tmp_path: Path) -> None:
    """As when standard error goes to a full disk: Python's own flush would end in status 120."""
    with small_disk(tmp_path / "disk") as disk, (disk / "log").open("w") as log:
        fill(disk)
        done = run_simulation(log.fileno())
    assert done.returncode == 0
    assert "cannot be written to (OSError: [Errno 28] No space left on device)" in done.stdout


def test_on_a_real_terminal_standard_output_stays_free() -> None:
    ours, theirs = pty.openpty()
    done = run_simulation(theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    assert done.stdout == "the result\n"
    text = shown.decode()
    assert "\x1b[?25l" in text
    assert text.rstrip().endswith("\x1b[?25h")
    assert "from a library" in text
    assert "100%" in text


# -- preparation ------------------------------------------------------------------------------


def test_preparation_is_one_line_for_each_label_in_a_file() -> None:
    stream = io.StringIO()
    with PreparationDisplay(stream) as display:
        for done in range(0, 1201, 100):
            display("reading", done, 1200)
        display("reading", 1200, 1200)
        display("learning", 0, 0)
        assert "learning" not in stream.getvalue()
        display("tokenizing", 0, 50)  # so learning is finished
        assert stream.getvalue().endswith("learning: 0s\n")
        display("tokenizing", 50, 50)
        display("saving", 3, 0)
    lines = stream.getvalue().splitlines()
    assert lines == ["reading: 1,200 in 0s", "learning: 0s", "tokenizing: 50 in 0s",
                     "saving: 3 in 0s"]  # fmt: skip


def test_preparation_that_fails_claims_nothing() -> None:
    stream = io.StringIO()

    def fail() -> None:
        with PreparationDisplay(stream) as display:
            display("learning", 0, 0)
            display("reading", 7, 1200)
            display("saving", 0, 0)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert stream.getvalue() == "learning: 0s\n"


def test_preparation_has_a_bar_on_a_terminal() -> None:
    stream = Terminal()
    with PreparationDisplay(stream) as display:
        display("reading [bold]", 600, 1200)
        display("reading [bold]", 1200, 1200)
    assert "reading [bold]" in stream.text()
    assert "1.2k/1.2k" in stream.text()
    assert stream.getvalue().rstrip().endswith("\x1b[?25h")
