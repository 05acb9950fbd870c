"""``ultrathink compare``: runs side by side: settings, curves, figures."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pydantic_core import to_jsonable_python

from ultrathink.cli.compare_view import print_comparison
from ultrathink.core.errors import UltrathinkError
from ultrathink.insight.comparison import Agreement, Comparison, Side, compare, read_side
from ultrathink.runs.folder import find_run

EPILOG = """what it shows:
  - what differs in configuration and environment
  - train loss and bits per byte over the steps that all runs have taken, or
    over the tokens where the runs' steps differ in size
  - the last and best figures, and the differences to the first run named

examples:
  ultrathink compare demo demo-2
  ultrathink compare runs/small runs/wide elsewhere/deep
  ultrathink compare demo demo-2 --json
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``ultrathink compare``."""
    parser.add_argument("runs", nargs="*", metavar="RUN", help="two or more run names or folders")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the comparison; the status is 0, whatever differs."""
    if len(args.runs) < 2:
        given = f"only {args.runs[0]!r} is given" if args.runs else "none is given"
        raise UltrathinkError(
            f"name at least two runs to compare, {given}; for example: "
            f"ultrathink compare {args.runs[0] if args.runs else 'demo'} demo-2"
        )
    runs = [find_run(name) for name in args.runs]
    labels = _labels(args.runs, [run.name for run in runs])
    sides = [read_side(run, label) for run, label in zip(runs, labels, strict=True)]
    comparison = compare(sides)
    if args.json:
        # A value that a run lacks is null.
        plain = to_jsonable_python(
            _to_json(comparison), inf_nan_mode="null", fallback=lambda absent: None
        )
        print(json.dumps(plain))
    else:
        print_comparison(comparison)
    return 0


def _labels(given: Sequence[str], names: list[str]) -> list[str]:
    """The runs' names; the words given where names are the same, numbered where these are too."""
    if len(set(names)) < len(names):
        names = [word.rstrip("/") for word in given]
    return [
        f"{name} ({names[: number + 1].count(name)})" if names.count(name) > 1 else name
        for number, name in enumerate(names)
    ]


def _to_json(comparison: Comparison) -> dict[str, Any]:
    return {
        "runs": [_side_to_json(side) for side in comparison.sides],
        "config": [asdict(item) for item in comparison.config],
        "manifest": [asdict(item) for item in comparison.manifest],
        "curves": {
            "axis": comparison.axis,
            "stretches": [asdict(stretch) for stretch in comparison.stretches],
            "agreement": [
                {agreement.split: _agreement_to_json(agreement) for agreement in pair}
                for pair in comparison.agreements
            ],
            "lone_metrics": comparison.lone_metrics,
        },
        "summary": {
            figure.name: {
                "values": figure.values,
                "differences": figure.differences,
                **({"steps": figure.at} if figure.at is not None else {}),
            }
            for figure in comparison.figures
        },
    }


def _side_to_json(side: Side) -> dict[str, Any]:
    return {
        "name": side.label,
        "path": str(side.path),
        "logged_steps": len(side.train),
        "validations": len(side.val),
        "segments": [
            {
                "from_step": segment.from_step,
                "changes": [asdict(change) for change in segment.changes],
            }
            for segment in side.segments
        ],
    }


def _agreement_to_json(agreement: Agreement) -> dict[str, Any]:
    return {
        "identical": agreement.is_identical,
        "common_steps": agreement.num_common,
        "equal_steps": agreement.num_equal,
        "last_equal_step": agreement.last_equal,
        "first_different_step": agreement.first_difference,
    }
