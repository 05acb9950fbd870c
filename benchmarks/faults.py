"""Faults in training, and what controllers make of them: the same real runs with each.

    python benchmarks/faults.py --quick --out /tmp/faults-quick
    python benchmarks/faults.py --processes 2 --out /tmp/faults
    python benchmarks/faults.py --out /tmp/faults --controller my_controller.py --fault my_fault.py

Each fault strikes a small model on `stdlib`, from one healthy snapshot a seed, beside each
controller. Its harm is measured against the clean twin: the same seed without the fault. What is
done is kept in the folder of --out and not done again; Ctrl-C loses the runs at work, no more. What
the figures mean, and how to write a fault or a controller, stands in docs/faults.md.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fault_detection import watch_run
from fault_parts import BARE, Part, chosen, fault_of, known_controllers, known_faults
from fault_queue import run_all
from fault_scoring import FAILED, HARM, RESOURCES, Alarms, Results, Run
from fault_setting import FULL, QUICK, Job, Setting, keep_setting, plan
from harness import parser, rows, setting, show, start

from ultrathink.core.errors import UltrathinkError

DETECTORS = "detectors alone"
ENOUGH_HEALTHY = 30_000  # steps, to count false alarms over


def main() -> None:
    """Do the runs that are not done yet and print what they came to."""
    args = _parsed()
    size = _size(args)
    faults = chosen(args.only, known_faults(args.fault), "fault")
    controllers = chosen(args.controllers, known_controllers(args.controller), "controller")
    if BARE not in controllers:  # what all are compared with
        controllers = {BARE: known_controllers()[BARE], **controllers}
    seeds = list(dict.fromkeys(args.seeds if args.seeds else [0] if args.quick else [0, 1, 2]))
    if args.processes < 1:
        raise UltrathinkError(f"--processes {args.processes}: give 1 or more.")
    out = args.out or Path(f"faults-{'quick' if args.quick else 'full'}")
    keep_setting(out, size)
    jobs = plan(size, faults.values(), list(controllers.values()), seeds)
    began = time.monotonic()
    done = run_all(jobs, size, out, processes=args.processes, verbose=not args.quiet)
    runs = {job: run_of(job, found) for job, found in done.items() if job.kind != "snapshot"}
    result = {
        "benchmark": "faults",
        "command": shlex.join(["python", "benchmarks/faults.py", *sys.argv[1:]]),
        "setting": setting(),
        "size": "quick" if args.quick else "full",
        "steps": asdict(size),
        "seeds": seeds,
        "processes": args.processes,
        "minutes_of_this_start": (time.monotonic() - began) / 60,
        "bounds": {"harm": HARM, "failed": FAILED},
        **summarize(list(runs.values()), watched(runs, out)),
    }
    show(result, describe(result), args.json)


def _parsed() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--out", type=Path, metavar="DIR", help="where results are kept")
    options.add_argument("--quick", action="store_true", help="one seed and short runs")
    options.add_argument("--only", nargs="+", metavar="FAULT", help="these faults only")
    options.add_argument("--controllers", nargs="+", metavar="NAME", help="these beside none")
    options.add_argument("--seeds", nargs="+", type=int)
    options.add_argument("--fault", action="append", default=[], type=Path, metavar="FILE")
    options.add_argument("--controller", action="append", default=[], type=Path, metavar="FILE")
    options.add_argument("--processes", type=int, default=1, help="runs at a time")
    options.add_argument("--quiet", action="store_true", help="do not report each run at its end")
    options.add_argument(
        "--steps", nargs=2, type=int, metavar=("SNAPSHOT", "END"), help="length of each run"
    )
    options.add_argument("--healthy-steps", type=int, metavar="N", help="for each controller")
    options.add_argument("--scored-tokens", type=int, metavar="N", help="of validation text")
    options.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="for all runs")
    args: argparse.Namespace = options.parse_args()
    return args


def _size(args: argparse.Namespace) -> Setting:
    """How large the benchmark is to be."""
    size = replace(QUICK if args.quick else FULL, overrides=tuple(args.set))
    if args.steps is not None:
        snapshot, end = args.steps
        if not 0 < snapshot < end:
            raise UltrathinkError(
                f"--steps {snapshot} {end}: the snapshot must come after step 0 and before the end."
            )
        size = replace(size, snapshot_step=snapshot, end_step=end)
    if args.healthy_steps is not None:
        size = replace(size, healthy_steps=args.healthy_steps)
    if args.scored_tokens is not None:
        size = replace(size, scored_tokens=args.scored_tokens)
    return size


def run_of(job: Job, found: Mapping[str, Any]) -> Run:
    """A run as it is scored."""
    assert job.controller is not None
    return Run(
        controller=job.controller.name,
        seed=job.seed,
        model=job.model,
        loss=found["loss"],
        num_steps=found["steps_taken"],
        interventions=tuple(found["interventions"]),
        fault=job.fault.name if job.fault is not None else "",
        group=_group(job.fault),
        injection=job.injection,
        died=found["died"],
        is_twin=job.kind == "clean",
        seconds=found["seconds"],
        memory_growth_gib=found["memory_growth_gib"],
    )


def _group(fault: Part | None) -> str:
    return fault_of(Path(fault.file)).group if fault is not None else ""


def watched(runs: Mapping[Job, Run], out: Path) -> dict[Run, Alarms]:
    """What detectors find in the runs without a controller."""
    return {run: watch_run(job, out) for job, run in runs.items() if run.controller == BARE}


def summarize(runs: list[Run], alarms: Mapping[Run, Alarms]) -> dict[str, Any]:
    """The figures of all controllers, faults and detectors."""
    results = Results(runs)
    models = sorted({run.model for run in results.struck})
    return {
        "controllers": {name: results.of_controller(name) for name in results.controllers},
        "faults": {name: results.of_fault(name) for name in results.faults},
        "detectors": results.of_detectors(alarms),
        "tolerance": {model: results.tolerance(model) for model in models},
    }


def describe(result: dict[str, Any]) -> str:
    """The result as tables: controllers; then each fault beside each controller."""
    lines = [
        (
            name,
            _percent(figures["recall"]),
            _number(figures["delay_steps_median"]),
            _number(figures["false_alarms_per_10k"], 1),
            _percent(figures.get("failed_share")),
            _percent(figures.get("recovered_share")),
            _percent(figures.get("within_1_percent_share")),
            _number(figures.get("final_loss_ratio_median"), 4),
            _number(figures.get("clean_loss_ratio_median"), 4),
            f"{figures['healthy_steps']:,}",
        )
        for name, figures in [
            *result["controllers"].items(),
            (DETECTORS, result["detectors"]),
        ]
    ]
    header = (
        *("", "recall", "delay", "false/10k", "failed", "recovered", "within 1%", "loss ratio"),
        *("clean ratio", "healthy steps"),
    )
    allowed = ", ".join(f"{share:.1%} ({model})" for model, share in result["tolerance"].items())
    any_controller = result["controllers"][BARE]
    text = (
        f"{result['size']}: {any_controller['num_runs']} runs a controller, of which "
        f"{any_controller['num_harmful']} harmful; seeds {result['seeds']}; "
        f"recovered: within {allowed} of the clean twin"
    )
    if any_controller["healthy_steps"] < ENOUGH_HEALTHY:
        text += (
            f"\nfewer than {ENOUGH_HEALTHY:,} healthy steps: too few to say that there is no false "
            f"alarm in 10,000"
        )
    reported = result["detectors"]["alarms_in_healthy_runs"]
    kinds = ", ".join(f"{count} {kind}" for kind, count in reported.items()) or "none"
    table = f"{text}\n{rows(header, lines)}\nalarms in healthy runs: {kinds}"
    tables = [table, _faults(result), _resources(result)]
    return "\n\n".join(table for table in tables if table)


def _faults(result: dict[str, Any]) -> str:
    """How much worse than its clean twin each controller ends, and what detectors saw."""
    names = list(result["controllers"])
    lines = []
    for fault, figures in result["faults"].items():
        if figures["group"] == RESOURCES:
            continue
        seen = result["detectors"]["faults"][fault]
        endings = [_ending(figures["controllers"][name]) for name in names]
        harmful = _percent(figures["harmful_share"])
        reported = _percent(seen["found_share"]), _number(seen["delay_steps_median"])
        lines.append((fault, figures["group"], harmful, *endings, *reported))
    header = ("", "group", "harmful", *names, "detected", "delay")
    return rows(header, lines) if lines else ""


def _resources(result: dict[str, Any]) -> str:
    """Of faults about resources: deaths, time and memory."""
    lines = []
    for fault, figures in result["faults"].items():
        if figures["group"] != RESOURCES:
            continue
        for name, own in figures["controllers"].items():
            seen = result["detectors"]["faults"][fault] if name == BARE else {}
            lines.append(
                (
                    f"{fault}, {name}",
                    _percent(own["died_share"]),
                    _number(own["time_ratio"], 2),
                    _number(own["memory_growth_gib"], 2),
                    _percent(seen.get("found_share")),
                    _number(seen.get("delay_steps_median")),
                )
            )
    header = ("resources", "died", "time", "memory GiB", "detected", "delay")
    return rows(header, lines) if lines else ""


def _ending(figures: dict[str, Any]) -> str:
    ratio = figures["final_loss_ratio_median"]
    return "failed" if ratio is None else f"{ratio - 1:+.1%}"


def _percent(part: float | None) -> str:
    return "-" if part is None else f"{part:.0%}"


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


if __name__ == "__main__":
    start(main)
