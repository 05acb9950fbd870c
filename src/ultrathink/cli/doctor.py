"""``ultrathink doctor``: is this machine fine, how fast is it, what will ``auto`` take, and why."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ultrathink.cli.arguments import (
    add_config_arguments,
    load_plugins,
    split_config_and_overrides,
)
from ultrathink.config.loading import load_config
from ultrathink.config.schema import Config
from ultrathink.monitoring.terminal import (
    SafeStream,
    error_stream,
    is_interactive,
    make_console,
)

if TYPE_CHECKING:
    from ultrathink.insight.doctor.diagnose import Progress
    from ultrathink.insight.doctor.report import Problem, Report

_EPILOG = """examples:
  ultrathink doctor                                  this machine, with the preset demo in mind
  ultrathink doctor --quick                          without measuring more than auto needs
  ultrathink doctor my.yaml training.device=cpu      what a configuration of yours would take
  ultrathink doctor --json > machine.json            all of it, for a bug report or a program

status: 0 where training works (warnings included), 1 where something makes it impossible
"""
_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``ultrathink doctor``."""
    parser.epilog = _EPILOG
    add_config_arguments(parser)
    parser.add_argument(
        "--quick", action="store_true", help="measure only what auto needs, in a second"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Look, and say what was found; 1 where something makes training impossible."""
    load_plugins(args)
    source, overrides = split_config_and_overrides(args.positionals)
    config = load_config(source, overrides)
    from ultrathink.insight.doctor.diagnose import diagnose

    with _progress() as progress:
        name = source or str(Config.default_preset)
        report = diagnose(config, name, quick=args.quick, progress=progress)
    out = SafeStream(sys.stdout)
    if args.json:
        print(json.dumps(report.to_json(), indent=2, allow_nan=False))
    elif is_interactive(out):
        _print_pretty(report, out)
    else:
        _print_plain(report)
    return 0 if report.can_train else 1


@contextmanager
def _progress() -> Iterator[Progress]:
    """Say on a terminal what is being done, in one line that is gone in the end."""
    stream = error_stream()
    if not is_interactive(stream):
        yield lambda doing: None
        return
    with make_console(stream).status("") as status:
        yield lambda doing: status.update(f"{doing} ...")


def _print_plain(report: Report) -> None:
    from ultrathink.insight.doctor.wording import sections, verdict

    for section in sections(report):
        print(section.title)
        width = max(len(label) for label, _ in section.lines)
        for label, text in section.lines:
            print(f"  {label:<{width}}  {text}")
        print()
    for problem in report.problems:
        print(_in_words(problem))
    if report.problems:
        print()
    print(verdict(report))


def _in_words(problem: Problem) -> str:
    fix = f"\n  fix: {problem.fix}" if problem.fix else ""
    return f"{problem.level}: {problem.text}{fix}"


def _print_pretty(report: Report, stream: SafeStream) -> None:
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    from ultrathink.insight.doctor.wording import sections, verdict

    console = make_console(stream)
    shown = sections(report)
    width = max(len(label) for section in shown for label, _ in section.lines)
    for section in shown:
        console.print(Text(section.title, style="bold"))
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(style="dim", width=width)
        table.add_column(overflow="fold", ratio=1)
        for label, text in section.lines:
            table.add_row(Text(label), Text(text))
        console.print(Padding(table, (0, 0, 1, 2)))
    for problem in report.problems:
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(width=len("warning"))
        table.add_column(overflow="fold", ratio=1)
        table.add_row(Text(problem.level, style=_STYLES[problem.level]), Text(problem.text))
        if problem.fix:
            table.add_row(Text("fix", style="dim"), Text(problem.fix))
        console.print(table)
    if report.problems:
        console.print()
    console.print(Text(verdict(report), style="bold green" if report.can_train else "bold red"))
