"""Learning rates that are too high from the beginning: where runs end alone, and where steered.

    python benchmarks/high_rates.py --processes 2
    python benchmarks/high_rates.py --times 1 10 --seeds 0 --json

The model of `faults.py` trains from its beginning with its tuned rate and with multiples of it,
with `orchestrator.mode` off and act, each with several seeds. Each run is scored on the same
held-out text and compared with the tuned run of its seed, without the orchestrator. A steered run
may take steps more than once: what that costs is printed beside it.
"""

from __future__ import annotations

import statistics
from typing import Any

from fault_setting import FULL
from harness import parser, rows, setting, show, start
from training_runs import train_all

TUNED = 0.005
MODES = ("off", "act")


def main() -> None:
    """Train with every rate, seed and mode, and print what came out."""
    options = parser(__doc__)
    options.add_argument("--times", nargs="+", type=float, default=[1, 10, 30], metavar="X")
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    options.add_argument("--steps", type=int, default=FULL.end_step)
    options.add_argument("--processes", type=int, default=1, help="runs at a time")
    options.add_argument("--quiet", action="store_true", help="do not report each run at its end")
    args = options.parse_args()
    wanted = [(times, mode) for times in args.times for mode in MODES]
    runs = {
        _label(times, mode, seed): [
            *FULL.config("dense", args.steps),
            "training.eval.every_steps=null",
            f"training.eval.max_tokens={FULL.scored_tokens}",
            "monitoring.sinks=[jsonl]",
            f"training.optimizer.lr={times * TUNED}",
            f"orchestrator.mode={mode}",
            f"run.seed={seed}",
        ]
        for seed in args.seeds
        for times, mode in dict.fromkeys([(1.0, "off"), *wanted])
    }
    done = train_all(runs, preset="debug", processes=args.processes, verbose=not args.quiet)
    result = {
        "benchmark": "high_rates",
        "steps": args.steps,
        "seeds": args.seeds,
        "setting": setting(),
        "rates": [
            {"times": times, "mode": mode, **_compared(done, times, mode, args.seeds)}
            for times, mode in wanted
        ],
    }
    show(result, describe(result), args.json)


def _label(times: float, mode: str, seed: int) -> str:
    return f"{times:g} times the tuned rate, {mode}, seed {seed}"


def _compared(
    done: dict[str, dict[str, Any]], times: float, mode: str, seeds: list[int]
) -> dict[str, Any]:
    """Over the seeds: losses, beside those of the tuned runs, and the rates and time it took."""
    found = [done[_label(times, mode, seed)] for seed in seeds]
    tuned = [done[_label(1, "off", seed)] for seed in seeds]
    changes = [one["loss"] / other["loss"] - 1 for one, other in zip(found, tuned, strict=True)]
    return {
        "losses": [one["loss"] for one in found],
        "changes": changes,
        "change": statistics.mean(changes),
        "worst": max(changes),
        "scales": [one["lr_scale"] for one in found],
        "steps_taken": statistics.mean(one["steps_taken"] for one in found),
    }


def describe(result: dict[str, Any]) -> str:
    """The result as a table, a line for each rate and mode."""
    lines = [
        (
            f"{one['times']:g} times, {one['mode']}",
            f"{one['change']:+.1%}",
            f"{one['worst']:+.1%}",
            " ".join(f"{one['times'] * scale:.2g}" for scale in one["scales"]),
            f"{one['steps_taken'] / result['steps']:.2f}",
        )
        for one in result["rates"]
    ]
    header = ("", "loss beside tuned", "worst seed", "rate at the end / tuned", "steps")
    reported = f"{result['steps']} steps, seeds {result['seeds']}"
    return f"{reported}\n{rows(header, lines)}"


if __name__ == "__main__":
    start(main)
