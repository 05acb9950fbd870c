"""What experts are worth: a dense model, 8 experts and MoE³ at equal work and in equal time.

    python benchmarks/sparse_quality.py --processes 2
    python benchmarks/sparse_quality.py --shape demo --steps 600 --minutes 3
    python benchmarks/sparse_quality.py --only dense MoE3 --seeds 0 1 2 --json

All are the preset `demo` with other feed-forward layers, in its own size or a small one (hidden
size 128, three layers): dense; 8 experts of a quarter of that width, top-2, beside a shared one of
half; MoE³ (knowledge 64 top-2, skill 32 top-2, meta 16 top-1, safety 8 top-1) beside a smaller
shared one. Gates are scaled by 2. A token takes as many FLOPs in each, routers included, within
half a per cent. At equal work they train on as many tokens; in equal time for as many minutes,
compilation included. Bits per byte are those of all held-out files.
"""

from __future__ import annotations

import os
import statistics
from typing import Any

from harness import parser, rows, setting, show, start
from training_runs import train_all

from ultrathink.core.errors import UltrathinkError, suggestion

GROUPS = {
    "8 experts": "[{name: experts, num_experts: 8, top_k: 2}]",
    "MoE3": "[{name: knowledge, num_experts: 64, top_k: 2}, {name: skill, num_experts: 32, "
    "top_k: 2}, {name: meta, num_experts: 16, top_k: 1}, {name: safety, num_experts: 8, top_k: 1}]",
}
MODELS = ("dense", *GROUPS)
SHAPES: dict[str, tuple[str, ...]] = {
    "small": ("hidden_size=128", "num_layers=3", "num_heads=4", "intermediate_size=256"),
    "demo": (),
}
WIDTHS = {  # of each expert, and of the one that every token meets
    ("small", "8 experts"): (64, 128),
    ("small", "MoE3"): (24, 56),
    ("demo", "8 experts"): (256, 512),
    ("demo", "MoE3"): (96, 384),
}


def model_overrides(shape: str, name: str) -> list[str]:
    """What makes the preset `demo` one of the models in one of the shapes."""
    found = [f"model.{option}" for option in SHAPES[shape]]
    if name in GROUPS:
        width, shared = WIDTHS[shape, name]
        widths = f"intermediate_size: {width}, shared_size: {shared}"
        found.append(f"model.moe={{groups: {GROUPS[name]}, {widths}, gate_scale: 2}}")
    return found


def main() -> None:
    """Run every model with every seed, both ways, and print what came out."""
    options = parser(__doc__)
    options.add_argument("--shape", choices=list(SHAPES), default="small")
    options.add_argument("--only", nargs="*", default=list(MODELS), metavar="MODEL")
    options.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    options.add_argument("--steps", type=int, default=2500, help="for equal work; 0 leaves it out")
    options.add_argument("--minutes", type=float, default=3, help="in equal time; 0 leaves it out")
    options.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="for all runs")
    options.add_argument("--processes", type=int, default=1, help="runs at a time")
    options.add_argument("--quiet", action="store_true", help="do not report each run at its end")
    args = options.parse_args()
    for name in args.only:
        if name not in MODELS:
            raise UltrathinkError(f"there is no model {name!r}. {suggestion(name, MODELS)}")
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    lengths = {}
    if args.steps:
        lengths["equal work"] = [f"training.max_steps={args.steps}", "training.compile=true"]
    if args.minutes:
        lengths["equal time"] = [f"training.max_minutes={args.minutes}"]
    runs = {
        f"{way}, {name}, seed {seed}": [
            *length,
            f"run.seed={seed}",
            *model_overrides(args.shape, name),
            *args.set,
        ]
        for seed in args.seeds  # those that are compared run one after the other
        for way, length in lengths.items()
        for name in args.only
    }
    done = train_all(runs, preset="demo", processes=args.processes, verbose=not args.quiet)
    result = {
        "benchmark": "sparse_quality",
        "shape": args.shape,
        "steps": args.steps,
        "minutes": args.minutes,
        "seeds": args.seeds,
        "processes": args.processes,
        "setting": setting(),
        "ways": {
            way: {
                name: summarize([done[f"{way}, {name}, seed {seed}"] for seed in args.seeds])
                for name in args.only
            }
            for way in lengths
        },
    }
    show(result, describe(result), args.json)


def summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Scores over the seeds, and what a run takes."""
    scores = [run["bits_per_byte"] for run in runs]
    return {
        "parameters": runs[0]["parameters"],
        "flops_per_token": runs[0]["flops_per_token"],
        "steps": statistics.median(run["step"] for run in runs),
        "minutes": statistics.median(run["minutes"] for run in runs),
        "losses": [run["loss"] for run in runs],
        "bits_per_byte": scores,
        "mean": statistics.mean(scores),
        "deviation": statistics.stdev(scores) if len(scores) > 1 else None,
    }


def describe(result: dict[str, Any]) -> str:
    """The result as a table; change is that of the mean against the first model."""
    lines = []
    for way, models in result["ways"].items():
        first = next(iter(models.values()))["mean"]
        for name, figures in models.items():
            deviation = figures["deviation"]
            lines.append(
                (
                    f"{way}: {name}",
                    f"{figures['parameters'] / 1e6:.1f}M",
                    f"{figures['flops_per_token'] / 1e6:.1f}M",
                    f"{figures['steps']:,.0f}",
                    f"{figures['minutes']:.2f}",
                    f"{figures['mean']:.3f}",
                    "" if deviation is None else f"{deviation:.3f}",
                    f"{figures['mean'] / first - 1:+.1%}",
                    " ".join(f"{score:.3f}" for score in figures["bits_per_byte"]),
                )
            )
    header = ("", "weights", "FLOPs/token", "steps", "minutes", "bits/byte", "deviation", "change")
    return rows((*header, "by seed"), lines)


if __name__ == "__main__":
    start(main)
