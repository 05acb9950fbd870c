"""``ultrathink report``: one page that explains a run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ultrathink.cli.arguments import file_to_write
from ultrathink.core.errors import UltrathinkError
from ultrathink.core.files import write_atomic
from ultrathink.insight.report.gathering import gather
from ultrathink.insight.report.page import render
from ultrathink.insight.report.plain import to_json
from ultrathink.runs.folder import find_run

DEFAULT_FILE = "report.html"
EPILOG = """The page is one file that needs no network: figures, curves with phases,
decisions and alarms, the decision table with reasons and audited gains,
forecasts and the actual loss, the load of experts, samples, configuration and
environment.

examples:
  ultrathink report demo                      writes runs/demo/report.html
  ultrathink report runs/demo --out demo.html
  ultrathink report demo --json               the content as JSON, for a program
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``ultrathink report``."""
    parser.add_argument("run", metavar="RUN", help="a run: its name or folder")
    parser.add_argument(
        "--out", metavar="FILE.html", help=f"where to write it (default: {DEFAULT_FILE} in the run)"
    )
    parser.add_argument(
        "--json", action="store_true", help="also print the content as one JSON object"
    )


def run(args: argparse.Namespace) -> int:
    """Write the page of a run, which may still be training."""
    out = _target(args.out)
    folder = find_run(args.run)
    path = folder.path / DEFAULT_FILE if out is None else out
    story = gather(folder)
    page = render(story).encode("utf-8", "backslashreplace")
    write_atomic(path, page)
    if args.json:
        print(json.dumps({"file": str(path), **to_json(story)}))
        return 0
    for note in story.notes:
        print(f"note: {note}")
    if not story.last_step:
        print("note: nothing was logged yet; the page has no curves.")
    print(f"{path}  ({len(page) / 1024:,.0f} KiB)")
    return 0


def _target(text: str | None) -> Path | None:
    """The file of ``--out``."""
    if text is None:
        return None
    path = file_to_write("--out", text)
    if path.is_dir():
        raise UltrathinkError(
            f"--out: {text!r} is a folder; name a file in it, for example {path / DEFAULT_FILE}"
        )
    return path
