"""Trading time for memory: activation checkpointing, and a loss that never holds all logits.

    python benchmarks/memory.py --shape M
    python benchmarks/memory.py --shape M --json

The real trainer at every setting of `training.activation_checkpointing`, and the same step with a
loss that computes all logits at once, alternating. Memory is the most that each process held, its
libraries included; `saved` is what the setting spares of it, `cost` what it adds to a step.
"""

from __future__ import annotations

import os
import statistics
from typing import Any

from harness import Contender, by_turns, parser, rows, setting, show, spread, start
from train_speed import SHAPES

from ultrathink.training.hardware import choose_device

CHECKPOINTING = ("none", "full")  # compiled runs refuse selective
WHOLE_LOGITS = "all logits at once"
CHUNKED = "logits in chunks"


def main() -> None:
    """Run the contenders and print what came out."""
    options = parser(__doc__)
    options.add_argument("--shape", choices=SHAPES, default="M")
    options.add_argument("--device", default="cpu")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--seconds", type=float, default=4.0, help="of training in each turn")
    options.add_argument("--threads", type=int, default=os.cpu_count())
    args = options.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    shape = {**SHAPES[args.shape], "device": str(choose_device(args.device))}
    result: dict[str, Any] = {"benchmark": "memory", "shape": args.shape, "setting": setting()}
    modes = {
        mode: ("ultrathink", {"overrides": [f"training.activation_checkpointing={mode}"]})
        for mode in CHECKPOINTING
    }
    losses = {CHUNKED: ("bare_loop", {}), WHOLE_LOGITS: ("whole_logits", {})}
    for title, entries in (("activation_checkpointing", modes), ("loss", losses)):
        contenders = {
            label: Contender(name, {**shape, **more}) for label, (name, more) in entries.items()
        }
        taken = by_turns(list(contenders.values()), args.rounds, args.seconds)
        result[title] = compare(contenders, taken)
    show(result, describe(result), args.json)


def compare(
    contenders: dict[str, Contender], taken: list[dict[Contender, dict[str, float]]]
) -> dict[str, dict[str, Any]]:
    """Speed and memory of each; cost and saving against the one that holds most."""
    most = max(contenders, key=lambda label: taken[-1][contenders[label]]["peak_memory_mib"])
    first = [turn[contenders[most]]["tokens_per_second"] for turn in taken]
    figures = {}
    for label, contender in contenders.items():
        speeds = [turn[contender]["tokens_per_second"] for turn in taken]
        slower = statistics.median(a / b for a, b in zip(first, speeds, strict=True))
        peak = taken[-1][contender]["peak_memory_mib"]
        figures[label] = {
            "tokens_per_second": spread(speeds),
            "peak_memory_mib": peak,
            "saved_mib": taken[-1][contenders[most]]["peak_memory_mib"] - peak,
            "cost": slower - 1,
        }
    return figures


def describe(result: dict[str, Any]) -> str:
    """The result as a table."""
    lines = [
        (
            label,
            f"{figures['tokens_per_second']['median']:,.0f}",
            f"{figures['peak_memory_mib']:,.0f}",
            f"{figures['saved_mib']:,.0f}",
            f"{figures['cost']:+.1%}",
        )
        for title in ("activation_checkpointing", "loss")
        for label, figures in result[title].items()
    ]
    header = ("", "tokens/s", "peak MiB", "saved", "cost")
    return f"shape {result['shape']}\n{rows(header, lines)}"


if __name__ == "__main__":
    start(main)
