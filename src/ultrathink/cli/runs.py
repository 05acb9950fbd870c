"""``ultrathink runs``: every run in a line, and whether the files of a run are intact."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic_core import to_jsonable_python

from ultrathink.checkpoint.format import read_state
from ultrathink.cli.arguments import add_plugin_argument
from ultrathink.core.errors import UltrathinkError, closest
from ultrathink.monitoring.report import Cell, Column, Report
from ultrathink.runs.folder import split_run
from ultrathink.runs.listing import RunSummary, list_runs
from ultrathink.runs.reading import RunReader
from ultrathink.training.budget import is_over

if TYPE_CHECKING:
    from ultrathink.runs.checking import Check

CHECK = "check"
UNSOUND = 1
EPILOG = """what to do:
  runs [DIR]       list the runs in a folder (default: runs), the newest first
  runs check RUN   read every file of a run and verify it, with --data also its
                   text and token cache; the status is 1 where one is damaged

states:
  running   a process is training it        finished  trained to its end
  stopped   can be resumed                  empty     has no checkpoint yet
  damaged   its configuration or last checkpoint cannot be used: see runs check

examples:
  ultrathink runs
  ultrathink runs elsewhere/runs --json
  ultrathink runs check demo
  ultrathink runs check demo@500            one checkpoint only
"""
_STATE_STYLES = {
    "running": "bold cyan",
    "finished": "green",
    "stopped": "yellow",
    "empty": "dim",
    "damaged": "bold red",
}
_STATUS_STYLES = {"ok": "green", "note": "yellow", "damaged": "bold red"}
_UNKNOWN = "-"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``ultrathink runs``."""
    parser.add_argument("words", nargs="*", metavar="DIR | check RUN", help="see below")
    add_plugin_argument(parser)
    parser.add_argument("--data", action="store_true", help="check: text and token cache as well")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """List runs (status 0), or check one (status 1 where something is damaged)."""
    words = args.words
    if words and words[0] == CHECK:
        if len(words) != 2:
            raise UltrathinkError(
                "say which run to check: ultrathink runs check RUN"
                + (f"; one at a time, not {' '.join(words[1:])}" if words[1:] else "")
            )
        return _check(words[1], data=args.data, as_json=args.json)
    if args.data:
        raise UltrathinkError("--data belongs to a check: ultrathink runs check RUN --data")
    if len(words) > 1:
        near = closest(words[0], [CHECK])
        raise UltrathinkError(
            f"{' '.join(map(repr, words))}: name one folder of runs, or check a run: ultrathink "
            f"runs check {words[1] if near else words[0]}"
        )
    return _list(Path(words[0] if words else "runs"), as_json=args.json)


# -- the list -------------------------------------------------------------------------------------


def _list(folder: Path, *, as_json: bool) -> int:
    runs = list_runs(folder, is_over)
    if as_json:
        found = {"runs": [_to_json(run) for run in runs]}
        print(json.dumps(to_jsonable_python(found, inf_nan_mode="null")))
    elif not runs:
        place = "" if folder == Path("runs") else f" run.dir={folder}"
        print(f"There is no run in {folder}/ yet. Start one: ultrathink train{place}")
    else:
        _print_list(runs)
    return 0


def _print_list(runs: Sequence[RunSummary]) -> None:
    report = Report()
    figures = ("step", "loss", "val loss", "bits/byte", "changed", "size")
    columns = [Column("run", folds=True), Column("state")]
    columns += [Column(title, right=True) for title in figures]
    now = time.time()
    rows: list[list[str | Cell]] = [
        [
            Cell(run.name, "bold"),
            Cell(run.state, _STATE_STYLES[run.state]),
            _steps(run),
            _figure(run.train_loss, 4),
            _figure(run.val_loss, 4),
            _figure(run.bits_per_byte, 3),
            Cell(_age(now - run.changed), "dim"),
            Cell(_size(run.size_bytes), "dim"),
        ]
        for run in runs
    ]
    report.table(columns, rows)
    troubled = [run for run in runs if run.problem]
    if troubled:
        report.line()
    for run in troubled:
        report.line(Cell(f"{run.name}: ", "bold red"), f"{run.problem}.")
    if troubled:
        report.line(f"What can be used: ultrathink runs check {troubled[0].path}")


def _to_json(run: RunSummary) -> dict[str, Any]:
    plain = asdict(run)
    owner = plain.pop("owner")
    process = None if owner is None else {"pid": owner["pid"], "host": owner["host"]}
    return {**plain, "path": str(run.path), "process": process}


def _steps(run: RunSummary) -> str:
    done = _UNKNOWN if run.step is None else f"{run.step:,}"
    return done if run.total_steps is None else f"{done}/{run.total_steps:,}"


def _figure(value: float | None, digits: int) -> str:
    return _UNKNOWN if value is None else f"{value:.{digits}f}"


def _age(seconds: float) -> str:
    """How long ago, in the largest unit that fits: ``42 s``, ``3 min``, ``5 h``, ``2 days``."""
    if seconds < 60:
        return f"{max(0, int(seconds))} s"
    if seconds < 3600:
        return f"{int(seconds / 60)} min"
    if seconds < 86_400:
        return f"{int(seconds / 3600)} h"
    days = int(seconds / 86_400)
    return f"{days:,} day{'s' if days > 1 else ''}"


def _size(num_bytes: int) -> str:
    """A size in binary units: ``812 B``, ``2.6 MiB``."""
    value, units = float(num_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


# -- one run --------------------------------------------------------------------------------------


def _check(name: str, *, data: bool, as_json: bool) -> int:
    from ultrathink.runs.checking import check_run, run_to_check

    run_name, which = split_run(name, "")
    check = check_run(run_to_check(run_name), which or None, data=data)
    command = f"ultrathink train --resume {run_name}"
    if check.newest_sound != check.newest:
        command += f"@{check.newest_sound}"
    if as_json:
        print(json.dumps(_check_to_json(check, command)))
    else:
        _print_check(check, command)
    return 0 if check.is_sound else UNSOUND


def _print_check(check: Check, command: str) -> None:
    report = Report()
    where = f", in use by {check.owner}" if check.owner is not None else ""
    report.line(Cell(f"run {check.run.path}", "bold"), where)
    rows: list[list[str | Cell]] = [
        [Cell(finding.status, _STATUS_STYLES[finding.status]), finding.item, finding.detail]
        for finding in check.findings
    ]
    report.table([Column(""), Column(""), Column("", folds=True)], rows, indent=2, heading=False)
    damaged = sum(finding.status == "damaged" for finding in check.findings)
    if damaged:
        report.line(Cell(f"Damaged: {damaged} of {len(check.findings)}.", "bold red"))
    else:
        report.line(Cell("Nothing is damaged.", "green"))
    if check.newest_sound is None:
        return
    if _is_finished(check):
        report.line(f"The run is finished: step {check.newest_sound:,} was its last.")
    elif not check.can_resume:
        report.line("To resume the run, restore its config.yaml and tokenizer first.")
    elif check.owner is None:
        report.line(f"To resume from step {check.newest_sound:,}: {command}")


def _is_finished(check: Check) -> bool:
    if check.newest_sound is None or not check.can_resume:
        return False
    state = read_state(check.run.checkpoint(check.newest_sound))
    return is_over(state, RunReader(check.run).config())


def _check_to_json(check: Check, command: str) -> dict[str, Any]:
    return {
        "run": str(check.run.path),
        "sound": check.is_sound,
        "findings": [asdict(finding) for finding in check.findings],
        "newest_sound_step": check.newest_sound,
        "resume": command if check.can_resume else None,
    }
