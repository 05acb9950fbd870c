"""What the watcher says of real training logs, and at what cost.

For each log: events by severity, alarms per 10,000 steps, how often forecasts made at 20, 30 … 90%
of the run held the loss at its end (the median of the last hundredth of its steps, at least 16),
and the processor time of all detectors a logged step.

    python benchmarks/watch_logs.py FOLDER            every file in it that is a training log
    python benchmarks/watch_logs.py RUN.json RUN.csv --json
"""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import numpy as np

from ultrathink.core.errors import DataError
from ultrathink.insight.logs.log import LogError
from ultrathink.insight.logs.opening import open_log
from ultrathink.orchestrator.curve import Curve
from ultrathink.orchestrator.events import SEVERITIES
from ultrathink.orchestrator.forecast import forecast
from ultrathink.orchestrator.signals import Signals
from ultrathink.orchestrator.watcher import Watcher
from ultrathink.orchestrator.windows import median

CUT_OFFS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def main() -> None:
    options = harness.parser(__doc__)
    options.add_argument("paths", nargs="+", type=Path, metavar="FOLDER|FILE")
    arguments = options.parse_args()
    measured: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for path in _files(arguments.paths):
        try:
            measured[path.name] = measure(list(open_log(path).signals()))
        except LogError as error:
            left_out[path.name] = str(error)
            print(f"{path.name} is left out: {error}", file=sys.stderr)
    if not measured:
        raise DataError("none of the files is a training log that can be watched")
    made = sum(one["forecasts"] for one in measured.values())
    held = sum(one["forecasts_held"] for one in measured.values())
    result = {
        "setting": harness.setting(),
        "logs": measured,
        "left_out": left_out,
        "forecast_coverage": held / made if made else None,
    }
    harness.show(result, _table(measured, held, made), arguments.json)


def measure(run: Sequence[Signals]) -> dict[str, Any]:
    """Events, forecasts and the cost of one log."""
    watcher = Watcher()
    begin = time.process_time()
    for signals in run:
        watcher.observe(signals)
    seconds = time.process_time() - begin
    watcher.finish()
    steps = [signals.step for signals in run]
    num_steps = max(steps) - min(steps) + 1 if steps else 0
    severities = Counter(event.severity for event in watcher.events)
    alarms = [event for event in watcher.events if event.is_alarm]
    held = forecasts_held(run)
    return {
        "steps": num_steps,
        "logged_steps": len(run),
        "events": {severity: severities[severity] for severity in SEVERITIES},
        "alarms": [event.to_json() for event in alarms],
        "alarms_per_10k_steps": 1e4 * len(alarms) / max(num_steps, 1),
        "forecasts": len(held),
        "forecasts_held": sum(held),
        "microseconds_per_step": 1e6 * seconds / max(len(run), 1),
    }


def forecasts_held(run: Sequence[Signals]) -> list[bool]:
    """Of the forecasts made along the way for the last step: whether it came as they said."""
    found = [(signals.step, signals.finite("loss")) for signals in run]
    losses = [(step, loss) for step, loss in found if loss is not None]
    if not losses or min(loss for _, loss in losses) <= 0:
        return []
    curve = Curve()
    last = [math.log(loss) for _, loss in losses[-max(16, len(losses) // 100) :]]
    truth = math.exp(median(np.array(last)))
    cuts = {int(share * len(losses)) for share in CUT_OFFS}
    held = []
    for number, (step, loss) in enumerate(losses):
        if number in cuts:
            ahead = forecast(curve, losses[-1][0])
            if ahead is not None:
                held.append(ahead.low <= truth <= ahead.high)
        curve.add(step, math.log(loss))
    return held


def _files(paths: Sequence[Path]) -> list[Path]:
    """The files named, and those in the folders named."""
    found: list[Path] = []
    for path in paths:
        is_folder = path.is_dir() and not (path / "metrics.jsonl").is_file()
        found += sorted(p for p in path.iterdir() if p.is_file()) if is_folder else [path]
    return found


def _table(measured: dict[str, Any], held: int, made: int) -> str:
    header = ("log", "steps", "logged", *SEVERITIES, "alarms/10k", "forecasts held", "µs/step")
    lines = [
        (
            name,
            f"{one['steps']:,}",
            f"{one['logged_steps']:,}",
            *one["events"].values(),
            f"{one['alarms_per_10k_steps']:.2f}",
            f"{one['forecasts_held']}/{one['forecasts']}",
            f"{one['microseconds_per_step']:.0f}",
        )
        for name, one in measured.items()
    ]
    return f"{harness.rows(header, lines)}\nforecasts held in all: {held} of {made}"


if __name__ == "__main__":
    harness.start(main)
