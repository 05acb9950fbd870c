"""The console of a run: a live progress bar on a terminal, plain lines elsewhere.

It writes to standard error; standard output is for results.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from typing import IO

from rich import box
from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ultrathink.monitoring.records import Level, MetricRecord, Note, RunInfo, Sink, Split
from ultrathink.monitoring.terminal import (
    SafeStream,
    clean_text,
    error_stream,
    is_interactive,
    make_console,
)
from ultrathink.monitoring.wording import short_number, short_time

LOGGER = logging.getLogger("ultrathink")  # its level is monitoring.log_level
REFRESH_S = 0.2
PLAIN_INTERVAL_S = 2.0
MAX_WIDTH = 100
MIN_WINDOW_S = 60.0  # over which the pace is measured
MIN_EVIDENCE_S = 2.0
POINTS = 200
_PHASES = {"INITIALIZATION": "first steps"}  # too few to judge; the other names say what they are
VALUE = "bold"
LABEL = "dim"


class ConsoleSink(Sink):
    """Shows the run on ``stream``, by default standard error."""

    def __init__(
        self, stream: IO[str] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._given_stream = stream
        self._clock = clock
        self._display: _LiveDisplay | _PlainDisplay | None = None
        self._stream: SafeStream | None = None
        self._reported_failure = False

    def open(self, info: RunInfo) -> None:
        self._stream = stream = error_stream(self._given_stream)
        status = _Status(info, self._clock)
        if is_interactive(stream):
            self._display = _LiveDisplay(status, make_console(stream), self._clock)
        else:
            self._display = _PlainDisplay(status, stream.write, self._clock)
        self._display.heading(info)

    def set_total_steps(self, total_steps: int) -> None:
        if self._display is not None:
            self._display.status.total_steps = total_steps

    def progress(self, step: int) -> None:
        """Move the bar, at most a few times a second."""
        if self._display is not None:
            self._display.status.advance(step)
            self._display.refresh()

    def write(self, record: MetricRecord) -> None:
        if self._display is not None:
            self._display.status.note(record)
            self._display.record(record)

    def message(self, text: str, level: Level) -> None:
        """Print a line above the bar, if its level is high enough."""
        severity = logging.getLevelNamesMapping()[level.upper()]
        if self._display is not None and severity >= LOGGER.level:
            self._display.message(clean_text(text), level)

    def phase(self, name: str) -> None:
        if self._display is not None:
            self._display.status.phase = _PHASES.get(name, name.lower())

    def decision(self, step: int, title: str, text: str) -> None:
        if self._display is not None:
            self._display.status.decision = f"{title} at {step:,}"
        self.message(text, "warning")

    def sample(self, step: int, prompt: str, text: str) -> None:
        if self._display is not None:
            self._display.sample(step, clean_text(prompt), clean_text(text))

    def take_notes(self) -> list[Note]:
        failure = self._stream.failure if self._stream is not None else None
        if self._reported_failure == (failure is not None):
            return []
        self._reported_failure = failure is not None
        if failure is None:
            return [("the console can be written to again", "info")]
        text = f"the console cannot be written to ({failure}); training continues"
        return [(f"{text}, and messages are in logs/run.log", "warning")]

    def close(self) -> None:
        if self._display is not None:
            self._display.close()
            self._display = None
        if self._stream is not None:
            self._stream.finish()


class Pace:
    """The recent time per step, everything between steps included.

    It is measured from the end of the first step, which compiles, over the last minute or the last
    third of the run, whichever is longer, so that one validation does not dominate it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._points: deque[tuple[float, int]] = deque()
        self._start: float | None = None

    def update(self, step: int) -> None:
        now = self._clock()
        if self._start is None:
            self._start = now
        window = max(MIN_WINDOW_S, (now - self._start) / 3)
        # The newest point is always kept; older ones are thinned to keep this cheap.
        if len(self._points) >= 2 and now - self._points[-2][0] < window / POINTS:
            self._points.pop()
        self._points.append((now, step))
        while len(self._points) > 2 and now - self._points[0][0] > window:
            self._points.popleft()

    def seconds_per_step(self) -> float | None:
        """Seconds from one step to the next; None while too few are measured."""
        if len(self._points) < 2:
            return None
        (first_time, first_step), (last_time, last_step) = self._points[0], self._points[-1]
        if last_step <= first_step or last_time - first_time < MIN_EVIDENCE_S:
            return None
        return (last_time - first_time) / (last_step - first_step)

    def seconds_left(self, total_steps: int) -> float | None:
        """Seconds until ``total_steps`` are done; None while too few are measured."""
        pace = self.seconds_per_step()
        if pace is None:
            return None
        last_time, last_step = self._points[-1]
        return max(0.0, (total_steps - last_step) * pace - (self._clock() - last_time))


class _Status:
    """The state of the run that both displays show."""

    def __init__(self, info: RunInfo, clock: Callable[[], float]) -> None:
        self.total_steps = info.total_steps
        self.step = info.start_step
        self.train: dict[str, float | int] = {}
        self.val: dict[str, float | int] = {}
        self.phase = ""  # of training
        self.decision = ""  # the last one
        self.closed = False
        self._clock = clock
        self._started = clock()
        self._pace = Pace(clock)

    def advance(self, step: int) -> None:
        self.step = step
        self._pace.update(step)

    def note(self, record: MetricRecord) -> None:
        self.step = max(self.step, record.step)
        if record.split == "train":
            self.train = record.values
        elif record.split == "val":
            self.val = record.values

    def is_done(self) -> bool:
        return self.total_steps > 0 and self.step >= self.total_steps

    def position(self) -> str:
        if self.total_steps > 0:
            return f"{self.step:,}/{self.total_steps:,}"
        return f"{self.step:,}"

    def time_left(self) -> str:
        if self.closed or self.is_done():
            return f"took {short_time(self._clock() - self._started)}"
        seconds = self._pace.seconds_left(self.total_steps) if self.total_steps > 0 else None
        if seconds is not None:
            return f"{short_time(seconds)} left"
        return "starting" if self.step == 0 else ""

    def figures(self, split: Split) -> list[tuple[str, str]]:
        values = self.train if split == "train" else self.val
        return [
            (label, show(values[name])) for name, label, show in _FIGURES[split] if name in values
        ]

    def situation(self) -> list[tuple[str, str]]:
        shown = [("phase", self.phase), ("decision", self.decision)]
        return [(label, value) for label, value in shown if value]

    def beside(self, record: MetricRecord) -> list[tuple[str, str]]:
        if record.split == "val":
            return self.figures("val")
        figures = {name: value for name, value in record.values.items() if name != "tokens"}
        return [(name, f"{value:.4g}") for name, value in figures.items()]


def _place(info: RunInfo) -> str:
    resumed = f", resumed after step {info.start_step:,}" if info.start_step else ""
    return f"saved in {info.folder}{resumed}"


def _loss(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else str(value)


def _perplexity(value: float) -> str:
    return f"{value:,.4g}" if value < 1e5 else f"{value:.2e}"


# Figures to show for each split, the most important first: name, label, format.
_FIGURES: dict[Split, list[tuple[str, str, Callable[[float], str]]]] = {
    "train": [
        ("loss", "loss", _loss),
        ("lr", "lr", "{:.2e}".format),
        ("tokens_per_sec", "tokens/s", short_number),
    ],
    "val": [
        ("loss", "val loss", _loss),
        ("bits_per_byte", "bits/byte", "{:.3f}".format),
        ("ppl", "perplexity", _perplexity),
    ],
}


class _PlainDisplay:
    """Lines of text without control sequences, few enough for a log file."""

    def __init__(
        self, status: _Status, write: Callable[[str], int], clock: Callable[[], float]
    ) -> None:
        self.status = status
        self._write = write
        self._clock = clock
        self._last_line = -math.inf

    def heading(self, info: RunInfo) -> None:
        self._line(f"{info.name}: {clean_text(info.heading)}")
        self._line(_place(info))

    def refresh(self) -> None:
        """Nothing moves here."""

    def record(self, record: MetricRecord) -> None:
        status = self.status
        if record.split != "train":
            self._line(_joined([f"step {status.position()}", *_pairs(status.beside(record))]))
            return
        now = self._clock()
        if now - self._last_line < PLAIN_INTERVAL_S and not status.is_done():
            return
        self._last_line = now
        figures = _pairs([*status.figures("train"), *status.situation()])
        self._line(_joined([f"step {status.position()}", *figures, status.time_left()]))

    def message(self, text: str, level: Level) -> None:
        self._line(f"warning: {text}" if level == "warning" else text)

    def sample(self, step: int, prompt: str, text: str) -> None:
        self._line(f"sample after step {step:,}:")
        for line in f"{prompt}{text}".rstrip().split("\n"):
            self._line(f"    {line}".rstrip())

    def close(self) -> None:
        """Nothing to restore."""

    def _line(self, text: str) -> None:
        self._write(f"{text}\n")


def _pairs(figures: list[tuple[str, str]]) -> list[str]:
    return [f"{label} {value}" for label, value in figures]


def _joined(parts: list[str]) -> str:
    return "  ".join(part for part in parts if part)


class _LiveDisplay:
    """Two lines at the bottom that follow the run; everything else scrolls above them."""

    def __init__(self, status: _Status, console: Console, clock: Callable[[], float]) -> None:
        self.status = status
        self._console = console
        self._clock = clock
        self._live = Live(
            console=console,
            get_renderable=self._render,
            auto_refresh=False,  # a thread would compete with training
            redirect_stdout=False,  # standard output is for results; warnings go above the bar
        )
        self._last_refresh = -math.inf

    def heading(self, info: RunInfo) -> None:
        lines = [Text(info.name, style="bold cyan")]
        lines += [Text(clean_text(line)) for line in info.heading.splitlines()]
        lines.append(Text(_place(info), style=LABEL))
        self._console.print(Group("", *lines, ""))
        self._live.start(refresh=True)

    def refresh(self, *, now: bool = False) -> None:
        moment = self._clock()
        if now or moment - self._last_refresh >= REFRESH_S:
            self._last_refresh = moment
            self._live.refresh()

    def record(self, record: MetricRecord) -> None:
        if record.split != "train":
            figures = _styled(self.status.beside(record))
            self._console.print(_fitted([Text(f"step {record.step:,}"), *figures], self._width()))
        self.refresh()

    def message(self, text: str, level: Level) -> None:
        if level == "warning":
            self._console.print(Text.assemble(("warning: ", "bold yellow"), text))
        else:
            self._console.print(Text(text))

    def sample(self, step: int, prompt: str, text: str) -> None:
        panel = Panel(
            Text.assemble((prompt, "bold"), text.rstrip()),
            title=Text(f"sample after step {step:,}", style=LABEL),
            title_align="left",
            box=box.ROUNDED,
            border_style=LABEL,
        )
        self._console.print(Constrain(panel, MAX_WIDTH))

    def close(self) -> None:
        self.status.closed = True
        self._live.stop()

    def _width(self) -> int:
        return min(self._console.width, MAX_WIDTH)

    def _render(self) -> RenderableType:
        status = self.status
        known = status.total_steps > 0
        bar = ProgressBar(
            total=status.total_steps if known else 1,
            completed=min(status.step, status.total_steps) if known else 0,
            complete_style="cyan",
            finished_style="green",
            style="bright_black",
        )
        row = Table.grid(expand=True, padding=(0, 2, 0, 0))
        row.add_column(ratio=1)
        cells: list[RenderableType] = [bar]
        share = f"{math.floor(100 * status.step / status.total_steps)}%" if known else ""
        for text, style in ((status.position(), ""), (share, VALUE), (status.time_left(), "cyan")):
            if text:
                row.add_column(no_wrap=True, justify="right")
                cells.append(Text(text, style=style))
        row.add_row(*cells)
        figures = [*status.figures("train"), *status.figures("val")[:2], *status.situation()]
        return Constrain(Group(row, _fitted(_styled(figures), self._width())), MAX_WIDTH)


def _styled(figures: list[tuple[str, str]]) -> list[Text]:
    return [
        Text.assemble((f"{label} ", LABEL), (value, "bold red" if value == "nan" else VALUE))
        for label, value in figures
    ]


def _fitted(parts: list[Text], width: int) -> Text:
    """The parts that fit on one line of ``width`` columns."""
    line = Text(no_wrap=True, overflow="ellipsis")
    for part in parts:
        gap = "   " if len(line) else ""
        if len(line) + len(gap) + len(part) <= width:
            line.append(gap)
            line.append_text(part)
    return line
