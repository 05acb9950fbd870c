"""Five compute paths of one model, beside a twin trained whole and a model of each path's shape.

    python benchmarks/elastic.py --steps 1500 --processes 2
    python benchmarks/elastic.py --seeds 0 --only elastic plain --json
    python benchmarks/elastic.py --only elastic --set training.objective.distill=0

All are the preset `demo-elastic` with the same steps and data: `elastic` trains every path, `plain`
only the whole model, and the others are models of the shape of one path, trained for it alone.
Bits per byte are those of all held-out files. The runs say something about depth only if the whole
model beats the model of its first quarter clearly; that lead is printed first. Agreement is the
share of held-out tokens for which a path's likeliest token is that of the whole model.
"""

from __future__ import annotations

import os
import statistics
from typing import Any

from harness import parser, rows, setting, show, start
from training_runs import train_all

from ultrathink.config import load_config
from ultrathink.core.errors import UltrathinkError, suggestion
from ultrathink.model.flops import flops_per_token

PRESET = "demo-elastic"
PATHS = ("fast", "standard", "expert", "deep", "ultra_deep")
DENSE = ("model.moe=null", "model.intermediate_size=512")
PLAIN = "training.objective=pretrain"
GROUPS = "model.moe.groups=[{name: experts, num_experts: 16, top_k: 4}]"
ALONE: dict[str, tuple[str, ...]] = {
    "fast": (PLAIN, "model.num_layers=2", *DENSE),
    "standard": (PLAIN, "model.num_layers=5", *DENSE),
    "expert": (PLAIN, "model.num_layers=5"),
    "ultra_deep": (PLAIN, GROUPS),
}
SCORED = "training.eval.paths=[fast, standard, expert, ultra_deep]"
MODELS: dict[str, tuple[str, ...]] = {
    "elastic": (SCORED,),
    "plain": (PLAIN, SCORED),
    **{f"{name} alone": words for name, words in ALONE.items()},
}
MIN_LEAD = 0.03


def main() -> None:
    """Train every model with every seed, and print what came out."""
    options = parser(__doc__)
    options.add_argument("--only", nargs="*", default=list(MODELS), metavar="MODEL")
    options.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    options.add_argument("--steps", type=int, default=1500)
    options.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="for all runs")
    options.add_argument("--processes", type=int, default=1, help="runs at a time")
    options.add_argument("--quiet", action="store_true", help="do not report each run at its end")
    args = options.parse_args()
    for name in args.only:
        if name not in MODELS:
            raise UltrathinkError(f"there is no model {name!r}. {suggestion(name, MODELS)}")
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    length = (f"training.max_steps={args.steps}", "training.compile=true")
    runs = {
        f"{name}, seed {seed}": [*MODELS[name], *length, f"run.seed={seed}", *args.set]
        for seed in args.seeds  # those that are compared run one after the other
        for name in args.only
    }
    done = train_all(runs, preset=PRESET, processes=args.processes, verbose=not args.quiet)
    of_seeds = {name: [done[f"{name}, seed {seed}"] for seed in args.seeds] for name in args.only}
    result = {
        "benchmark": "elastic",
        "steps": args.steps,
        "seeds": args.seeds,
        "setting": setting(),
        "flops": flops_of_paths(),
        "minutes": {
            name: statistics.median(r["minutes"] for r in each) for name, each in of_seeds.items()
        },
        "bits_per_byte": {name: scores(each) for name, each in of_seeds.items()},
        "agreement": {
            name: [run["agreement"] for run in each]
            for name, each in of_seeds.items()
            if each[0]["agreement"]
        },
    }
    show(result, describe(result), args.json)


def flops_of_paths() -> dict[str, float]:
    """Operations per token of each path, as a share of the whole model's."""
    config = load_config(PRESET)
    whole = flops_per_token(config.model, config.data.seq_len)
    return {n: flops_per_token(config.model, config.data.seq_len, n) / whole for n in PATHS}


def scores(runs: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Bits per byte of each scored path, by seed; a model of one path has `deep` alone."""
    per_nat = [run["bits_per_byte"] / run["loss"] for run in runs]
    found = {"deep": [run["bits_per_byte"] for run in runs]}
    for name in runs[0]["path_losses"]:
        found[name] = [
            run["path_losses"][name] * ratio for run, ratio in zip(runs, per_nat, strict=True)
        ]
    return found


def describe(result: dict[str, Any]) -> str:
    """The lead of the whole model, and a table by path."""
    by_model, lines, heading = result["bits_per_byte"], [], ""
    if "plain" in by_model and "fast alone" in by_model:
        whole, quarter = by_model["plain"]["deep"], by_model["fast alone"]["deep"]
        lead = 1 - statistics.fmean(whole) / statistics.fmean(quarter)
        verdict = "" if lead >= MIN_LEAD else ": too little to judge depth by"
        heading = f"the whole model is {lead:.1%} better than its first quarter alone{verdict}\n"
    for path in PATHS:
        alone = by_model.get("plain" if path == "deep" else f"{path} alone", {}).get("deep")
        lines.append(
            (
                path,
                f"{result['flops'][path]:.0%}",
                *(_mean(by_model.get(name, {}).get(path)) for name in ("elastic", "plain")),
                _mean(alone),
                _change(by_model.get("elastic", {}).get(path), alone),
                _mean(
                    [each[path] for each in result["agreement"].get("elastic", []) if path in each]
                ),
            )
        )
    header = ("path", "FLOPs", "elastic", "plain", "alone", "elastic / alone", "agreement")
    minutes = ", ".join(f"{name} {value:.1f}" for name, value in result["minutes"].items())
    return f"{heading}{rows(header, lines)}\nminutes: {minutes}"


def _mean(values: list[float] | None) -> str:
    if not values:
        return ""
    spread = f" ±{statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def _change(ours: list[float] | None, theirs: list[float] | None) -> str:
    if not ours or not theirs:
        return ""
    return f"{statistics.fmean(ours) / statistics.fmean(theirs) - 1:+.1%}"


if __name__ == "__main__":
    start(main)
