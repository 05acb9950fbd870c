"""``ultrathink audit``: replay the decisions of a run, and measure what each was worth."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from ultrathink.cli.arguments import add_plugin_argument
from ultrathink.core.streams import print_stderr
from ultrathink.runs.decisions import Audit
from ultrathink.runs.folder import find_run

EPILOG = """Each decision is replayed from the state that was kept when it was taken, with
and without it, over several data orders. The difference in validation loss is
printed with its 95% interval and written to the run's decisions.jsonl.
Negative means that the decision helped.

examples:
  ultrathink audit demo
  ultrathink audit demo --decision 3 --orders 8 --horizon 500
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``ultrathink audit``."""
    parser.add_argument("run", metavar="RUN", help="name or folder of a run")
    parser.add_argument("--decision", type=int, metavar="K", help="only decision number K")
    parser.add_argument(
        "--orders", type=int, default=4, metavar="N", help="data orders (default: 4)"
    )
    parser.add_argument(
        "--horizon",
        type=int,
        metavar="N",
        help="steps after the decision to judge at (default: 200)",
    )
    add_plugin_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Audit; the status is 0 once every result is written."""
    from ultrathink.recipes.audit import audit_run

    results = audit_run(
        find_run(args.run),
        decision=args.decision,
        orders=args.orders,
        horizon=args.horizon,
        report=print_stderr,
    )
    if args.json:
        print(json.dumps({number: asdict(audit) for number, audit in results.items()}))
        return 0
    for number, audit in results.items():
        print(described(number, audit))
    return 0


def described(number: int, audit: Audit) -> str:
    """The result in a line."""
    return (
        f"decision {number}: {audit.mean:+.4f} nats a token after {audit.horizon} steps (95% "
        f"{audit.low:+.4f} to {audit.high:+.4f}, {audit.orders} data orders). {audit.statement}"
    )
