"""``ultrathink doctor``: what the machine has, how fast it is, and what ``auto`` chooses on it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager

from ultrathink.cli.arguments import (
    add_config_arguments,
    split_config_and_overrides,
)
from ultrathink.config.loading import load_config
from ultrathink.config.schema import Config
from ultrathink.insight.doctor.diagnose import Progress, diagnose
from ultrathink.insight.doctor.report import Diagnosis
from ultrathink.insight.doctor.wording import sections, verdict
from ultrathink.monitoring.report import Cell, Column, Report
from ultrathink.monitoring.terminal import error_stream, is_interactive, make_console

EPILOG = """examples:
  ultrathink doctor                         for a run of the preset demo
  ultrathink doctor --quick                 measure only what auto needs
  ultrathink doctor my.yaml training.device=cpu
                                            for a run of your own
  ultrathink doctor --json > machine.json   for a bug report or a program

status: 0 where training works (warnings included), 1 where something makes it
impossible
"""
_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``ultrathink doctor``."""
    add_config_arguments(parser)
    parser.add_argument(
        "--quick", action="store_true", help="measure only what auto needs, in a second"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the findings; 1 where something makes training impossible."""
    source, overrides = split_config_and_overrides(args.positionals)
    config = load_config(source, overrides)
    with _progress() as progress:
        name = source or str(Config.default_preset)
        report = diagnose(config, name, quick=args.quick, progress=progress)
    if args.json:
        print(json.dumps(report.to_json(), indent=2, allow_nan=False))
    else:
        _print(report)
    return 0 if report.can_train else 1


@contextmanager
def _progress() -> Iterator[Progress]:
    """Show the current stage on a terminal, in one line that disappears at the end."""
    stream = error_stream()
    if not is_interactive(stream):
        yield lambda doing: None
        return
    with make_console(stream).status("") as status:
        yield lambda doing: status.update(f"{doing} ...")


def _print(diagnosis: Diagnosis) -> None:
    report = Report()
    for title, lines in sections(diagnosis).items():
        report.line(Cell(title, "bold"))
        cells: list[list[str | Cell]] = [[Cell(label, "dim"), text] for label, text in lines]
        report.table([Column(""), Column("", folds=True)], cells, indent=2, heading=False)
        report.line()
    rows: list[list[str | Cell]] = []
    for problem in diagnosis.problems:
        rows.append([Cell(f"{problem.level}: {problem.text}", _STYLES[problem.level])])
        rows += [[f"  fix: {problem.fix}"]] if problem.fix else []
    rows += [[""]] if rows else []
    rows.append([Cell(verdict(diagnosis), "bold green" if diagnosis.can_train else "bold red")])
    report.table([Column("", folds=True)], rows, heading=False)
