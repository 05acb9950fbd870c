"""``ultrathink watch``: find what went wrong in a training log."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path

from ultrathink.cli.arguments import file_to_write
from ultrathink.cli.watch_view import FollowView, print_analysis
from ultrathink.core.errors import UltrathinkError
from ultrathink.core.streams import print_stderr
from ultrathink.insight.log_analysis import LogAnalysis
from ultrathink.insight.logs.log import NotYetError
from ultrathink.insight.logs.names import parse_columns
from ultrathink.insight.logs.opening import open_log
from ultrathink.insight.picture import draw_picture, require_matplotlib

POLL_S = 0.5
PICTURES = (".png", ".svg", ".pdf")
EPILOG = """FILE is a run (its folder or name), or the log of another trainer: Hugging
Face's trainer_state.json, CSV, JSON lines, Megatron's JSON, or printed lines
(llm.c, DeepSpeed, Megatron-LM, nanoGPT, torchtitan, OLMo and others). Its
format is recognized by its content; columns are guessed, or named with
--columns.

examples:
  ultrathink watch demo
  ultrathink watch runs/demo --follow
  ultrathink watch trainer_state.json --plot course.png
  ultrathink watch log.csv --columns loss=nll,step=it --json
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``ultrathink watch``."""
    parser.add_argument("file", metavar="FILE", help="a training log, or a run")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object; one a line with --follow"
    )
    parser.add_argument(
        "--follow", action="store_true", help="keep reading as the log grows, until Ctrl-C"
    )
    parser.add_argument(
        "--columns",
        action="append",
        default=[],
        metavar="SIGNAL=COLUMN,...",
        help="the columns of the loss, the step, …",
    )
    parser.add_argument(
        "--plot", metavar="FILE.png", help="draw the curve with events and phases (or .svg, .pdf)"
    )


def run(args: argparse.Namespace) -> int:
    """Watch a log to its end, or with ``--follow`` until Ctrl-C (status 130)."""
    columns = parse_columns(args.columns)
    picture = _picture_path(args.plot)
    if args.follow:
        _Follower(args.file, columns, picture, as_json=args.json).run()
    else:
        _watch(args.file, columns, picture, as_json=args.json)
    return 0


def _watch(file: str, columns: Mapping[str, str], picture: Path | None, *, as_json: bool) -> None:
    log = open_log(file, columns)
    analysis = LogAnalysis(log)
    for signals in log.signals():
        analysis.observe(signals)
    analysis.finish()
    if picture is not None:
        draw_picture(analysis, picture)
    if as_json:
        print(json.dumps(analysis.report()))
    else:
        print_analysis(analysis)
        if picture is not None:
            print(f"\nThe curve with events and phases: {picture}")


class _Follower:
    """Waits for a log, and prints events as they occur; reads a replaced log from its start."""

    def __init__(
        self, file: str, columns: Mapping[str, str], picture: Path | None, *, as_json: bool
    ) -> None:
        self._file = file
        self._columns = columns
        self._picture = picture
        self._as_json = as_json
        self._analysis: LogAnalysis | None = None
        self._view: FollowView | None = None
        self._waits_for = ""

    def run(self) -> None:
        """Follow until Ctrl-C, and draw what was seen until then."""
        try:
            while True:
                self._look()
                time.sleep(POLL_S)
        except KeyboardInterrupt:
            if self._picture is not None and self._analysis is not None:
                draw_picture(self._analysis, self._picture)
            raise

    def _look(self) -> None:
        try:
            if self._analysis is None:
                self._open()
            self._read()
        except FileNotFoundError:  # it may come again, as another file
            self._wait(f"{self._file} is gone")
        except NotYetError as error:
            self._wait(str(error).rstrip("."))

    def _open(self) -> None:
        log = open_log(self._file, self._columns)
        self._analysis = LogAnalysis(log)
        self._waits_for = ""
        if self._view is None:
            self._view = FollowView(as_json=self._as_json)
        self._view.begin(log)

    def _read(self) -> None:
        assert self._analysis is not None
        assert self._view is not None
        news = self._analysis.log.poll()
        if news.is_replaced:
            print_stderr(f"{self._file} was cut or replaced; it is read from its beginning")
            self._analysis = None
            return self._look()
        for signals in news.signals:
            events = self._analysis.observe(signals)
            course = self._analysis.runs[signals.run]
            self._view.show(course, events, is_named=self._analysis.has_several)
        return None

    def _wait(self, reason: str) -> None:
        if reason != self._waits_for:
            self._waits_for = reason
            print_stderr(f"waiting: {reason}")


def _picture_path(text: str | None) -> Path | None:
    """The file of ``--plot``."""
    if text is None:
        return None
    path = file_to_write("--plot", text)
    if path.suffix.lower() not in PICTURES:
        raise UltrathinkError(
            f"--plot: {text!r} does not end in {', '.join(PICTURES)}; name a picture, for example "
            f"{path.with_suffix('.png')}"
        )
    require_matplotlib()
    return path
