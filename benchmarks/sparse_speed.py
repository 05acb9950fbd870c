"""Whole training steps of models with experts, beside Mixtral and beside a dense twin.

    python benchmarks/sparse_speed.py --shape X64
    python benchmarks/sparse_speed.py --shape X
    python benchmarks/sparse_speed.py --shape MoE3 --json
    python benchmarks/sparse_speed.py --shape X --checkout ../parent --launches 7

X is shape S with 8 experts of width 344, top-2; X64 has 64 of width 128, top-2; MoE3 the groups
knowledge 64 top-2, skill 32 top-2, meta 16 top-1, safety 8 top-1, of width 64. The dense twin is
our own model with a feed-forward layer as wide as the experts of a token together. Mixtral is that
of Hugging Face with `experts_implementation="grouped_mm"` in bf16; it knows one group, so MoE3 is
compared with the twin only. Ours is the real trainer, as in `train_speed.py`. Printed are medians
over the rounds and the medians of the ratios within a round; MFU counts the active parameters.
"""

from __future__ import annotations

import argparse
import os

import torch
from harness import Contender, add_checkout, add_turns, by_turns, parser, setting, show, start
from train_speed import (
    OURS,
    SHAPES,
    Turns,
    describe,
    launches_with_checkout,
    summarize,
    utilization,
)

from ultrathink.training.hardware import choose_device

SPARSE = ("X", "X64", "MoE3", "XS-moe")


def main() -> None:
    """Run the contenders and print what came out."""
    options = parser(__doc__)
    options.add_argument("--shape", choices=SPARSE, default="X64")
    add_turns(options)
    add_checkout(options)
    args = options.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    device = choose_device(args.device)
    shape, twin = SHAPES[args.shape], SHAPES[f"{args.shape}-dense"]
    if args.checkout is not None:
        launches = launches_with_checkout({**shape, "device": str(device)}, args)
        _show(OURS, launches, args, device)
        return
    contenders = {"ultrathink": ("ultrathink", shape), "dense twin": ("ultrathink", twin)}
    if len(shape["model"]["moe"]["groups"]) == 1:
        contenders["Mixtral grouped_mm"] = ("hf_mixtral", shape)
    started = [
        Contender(name, {**sizes, "device": str(device)}) for name, sizes in contenders.values()
    ]
    names = tuple(contenders)
    labels = dict(zip(started, names, strict=True))
    turns = by_turns(started, args.rounds, args.seconds)
    taken = [{labels[one]: answer for one, answer in turn.items()} for turn in turns]
    _show(names, [taken], args, device)


def _show(
    names: tuple[str, ...],
    launches: list[Turns],
    args: argparse.Namespace,
    device: torch.device,
) -> None:
    result = {
        "benchmark": "sparse_speed",
        "shape": args.shape,
        "setting": setting(),
        **summarize(names, launches),
        **utilization(names, launches, SHAPES[args.shape], device),
    }
    show(result, describe(result), args.json)


if __name__ == "__main__":
    start(main)
