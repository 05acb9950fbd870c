"""What keeps the experts of MoE³ busy, and what that costs: load and loss after 1,000 steps.

    python benchmarks/sparse_balance.py --processes 2
    python benchmarks/sparse_balance.py --only none default --seeds 0 1 2 --json

Each way of balancing trains the same small MoE³ (knowledge 64 top-2, skill 32 top-2, meta 16 top-1,
safety 8 top-1) on `stdlib`, with each seed. Then all held-out text goes through it: loads are those
of its tokens, Gini and utilization (mean over maximum load) the worst of all layers, and beside
them the Gini coefficient of experts drawn at random. The loss is compared with that of the same
seed without balancing.
"""

from __future__ import annotations

import os
import statistics
from typing import Any

from harness import parser, rows, setting, show, start
from training_runs import train_all

from ultrathink.core.errors import UltrathinkError, suggestion

_OFF = ("load=0", "importance=0", "entropy=0", "z=0", "bias_rate=0")
WAYS: dict[str, tuple[str, ...]] = {  # of model.moe.balance
    "default": (),
    "none": _OFF,
    "load loss": (*_OFF, "load=0.01"),
    "bias": (*_OFF, "bias_rate=0.01"),
    "bias and z": (*_OFF, "bias_rate=0.01", "z=0.001"),
    "reference": ("load=0.01", "importance=0.005", "entropy=0.5", "z=0.001", "bias_rate=0"),
    "reference without entropy": (
        "load=0.01",
        "importance=0.005",
        "entropy=0",
        "z=0.001",
        "bias_rate=0",
    ),
}


def main() -> None:
    """Run every way with every seed and print what came out."""
    options = parser(__doc__)
    options.add_argument("--only", nargs="*", default=list(WAYS), metavar="WAY")
    options.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    options.add_argument("--steps", type=int, default=1000)
    options.add_argument("--preset", default="demo-moe")
    options.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="for all runs")
    options.add_argument("--processes", type=int, default=1, help="runs at a time")
    options.add_argument("--quiet", action="store_true", help="do not report each run at its end")
    args = options.parse_args()
    for way in args.only:
        if way not in WAYS:
            raise UltrathinkError(f"{way!r} is no way to balance. {suggestion(way, WAYS)}")
    ways = list(dict.fromkeys([*args.only, "none"]))
    common = [f"training.max_steps={args.steps}", *args.set]
    runs = {
        f"{way}, seed {seed}": [
            *common,
            f"run.seed={seed}",
            *(f"model.moe.balance.{option}" for option in WAYS[way]),
        ]
        for seed in args.seeds
        for way in ways
    }
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    done = train_all(runs, preset=args.preset, processes=args.processes, verbose=not args.quiet)
    result = {
        "benchmark": "sparse_balance",
        "steps": args.steps,
        "seeds": args.seeds,
        "setting": setting(),
        "scored_tokens": next(iter(done.values()))["scored_tokens"],
        "ways": {
            way: summarize(
                [done[f"{way}, seed {seed}"] for seed in args.seeds],
                [done[f"none, seed {seed}"] for seed in args.seeds],
            )
            for way in ways
        },
    }
    show(result, describe(result), args.json)


def summarize(runs: list[dict[str, Any]], unbalanced: list[dict[str, Any]]) -> dict[str, Any]:
    """Over the seeds: mean loss, its mean change, and each group's worst load."""
    losses = [run["loss"] for run in runs]
    changes = [run["loss"] / other["loss"] - 1 for run, other in zip(runs, unbalanced, strict=True)]
    groups = {
        name: {
            "gini": max(max(run["groups"][name]["gini"]) for run in runs),
            "gini_of_noise": runs[0]["groups"][name]["gini_of_noise"],
            "utilization": min(min(run["groups"][name]["utilization"]) for run in runs),
            "dead": max(run["groups"][name]["dead"] for run in runs),
        }
        for name in runs[0]["groups"]
    }
    return {
        "loss": statistics.mean(losses),
        "losses": losses,
        "change": statistics.mean(changes),
        "changes": changes,
        "groups": groups,
    }


def describe(result: dict[str, Any]) -> str:
    """The result as a table, a line for each way and group."""
    lines = []
    for way, figures in result["ways"].items():
        for number, (name, group) in enumerate(figures["groups"].items()):
            lines.append(
                (
                    way if number == 0 else "",
                    f"{figures['loss']:.4f}" if number == 0 else "",
                    f"{figures['change']:+.2%}" if number == 0 else "",
                    name,
                    f"{group['gini']:.3f}",
                    f"{group['gini_of_noise']:.3f}",
                    f"{group['utilization']:.2f}",
                    str(group["dead"]),
                )
            )
    header = ("", "loss", "change", "group", "Gini", "by chance", "utilization", "dead")
    reported = (
        f"{result['steps']} steps, seeds {result['seeds']}, {result['scored_tokens']:,} tokens"
    )
    return f"{reported}\n{rows(header, lines)}"


if __name__ == "__main__":
    start(main)
