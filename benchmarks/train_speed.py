"""Whole training steps beside a peer: the same shape, the same minutes, alternating.

    python benchmarks/train_speed.py --shape S --against hf
    python benchmarks/train_speed.py --shape M --against hf --json
    python benchmarks/train_speed.py --shape S --overhead
    python benchmarks/train_speed.py --shape 760M --device cuda
    python benchmarks/train_speed.py --shape S --checkout ../parent --rounds 8 --launches 7

Each contender is a separate process. Ours is the real trainer with `auto` for what a user leaves
out, with its loader, and with console (on a terminal), JSONL and TensorBoard; a peer gets a bare
loop of forward, backward, clipping and fused AdamW over batches that lie ready. Printed are medians
over the rounds with the lowest and highest, and the median of the ratios within a round. With
`--checkout` the only peer is our trainer of another source tree; the mean of the paired ratios of
step times is printed with its 95% interval. Two launches of the same code differ by a percent, as
their memory lies: `--launches` repeats both, and takes each launch for one measurement.
"""

from __future__ import annotations

import argparse
import os
import statistics
from itertools import chain
from typing import Any

import torch
from harness import (
    Contender,
    add_checkout,
    add_turns,
    by_turns,
    parser,
    ratio_interval,
    rows,
    setting,
    show,
    spread,
    start,
)

from ultrathink.config.model import ModelConfig
from ultrathink.model.flops import flops_per_token
from ultrathink.training.hardware import choose_device, choose_precision, peak_flops

_S: dict[str, Any] = {
    "model": {"hidden_size": 256, "num_layers": 6, "num_heads": 8, "num_kv_heads": 4}
    | {"intermediate_size": 688, "vocab_size": 8192},
    "seq_len": 256,
    "batch_size": 8,
}


def _group(name: str, num_experts: int, top_k: int) -> dict[str, Any]:
    return {"name": name, "num_experts": num_experts, "top_k": top_k}


def _sparse(width: int, groups: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """Shape S with groups of experts, each (number, top-k), of one width."""
    moe = {
        "intermediate_size": width,
        "groups": [_group(name, number, top_k) for name, (number, top_k) in groups.items()],
    }
    return _S | {"model": _S["model"] | {"moe": moe}}


def _twin(width: int) -> dict[str, Any]:
    """Shape S, dense, of another width."""
    return _S | {"model": _S["model"] | {"intermediate_size": width}}


SHAPES: dict[str, dict[str, Any]] = {
    "XS": {  # to try this script
        "model": {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
        | {"intermediate_size": 128, "vocab_size": 512},
        "seq_len": 64,
        "batch_size": 4,
    },
    "S": _S,
    "M": {
        "model": {"hidden_size": 512, "num_layers": 8, "num_heads": 8, "num_kv_heads": 4}
        | {"intermediate_size": 1376, "vocab_size": 16384},
        "seq_len": 512,
        "batch_size": 4,
    },
    "XS-moe": {  # to try sparse_speed.py
        "model": {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
        | {"intermediate_size": 128, "vocab_size": 512}
        | {"moe": {"intermediate_size": 32, "groups": [_group("experts", 4, 2)]}},
        "seq_len": 64,
        "batch_size": 4,
    },
    "XS-moe-dense": {
        "model": {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
        | {"intermediate_size": 64, "vocab_size": 512},
        "seq_len": 64,
        "batch_size": 4,
    },
    # Experts of the same active width in three shapes, and their dense twins.
    "X": _sparse(344, {"experts": (8, 2)}),
    "X-dense": _twin(2 * 344),
    "X64": _sparse(128, {"experts": (64, 2)}),
    "X64-dense": _twin(2 * 128),
    "MoE3": _sparse(
        64, {"knowledge": (64, 2), "skill": (32, 2), "meta": (16, 1), "safety": (8, 1)}
    ),
    "MoE3-dense": _twin(6 * 64),
    "760M": {  # for a GPU
        "model": {"hidden_size": 1536, "num_layers": 24, "num_heads": 12, "num_kv_heads": 12}
        | {"intermediate_size": 4096, "vocab_size": 32768},
        "seq_len": 2048,
        "batch_size": 16,
    },
}
CONTENDERS = {
    "hf": ("ultrathink", "hf_compiled_bf16", "hf_default_fp32"),
    "overhead": ("ultrathink", "bare_loop"),
}


OURS = ("ultrathink", "checkout")
Turns = list[dict[str, dict[str, float]]]  # what each contender answered, a round each


def launches_with_checkout(arguments: dict[str, Any], args: argparse.Namespace) -> list[Turns]:
    """The turns of this source tree's trainer and of that of ``--checkout``, for each launch."""
    launches = []
    for _ in range(args.launches):
        contenders = [
            Contender("ultrathink", arguments),
            Contender("ultrathink", arguments, args.checkout.resolve()),
        ]
        turns = by_turns(contenders, args.rounds, args.seconds)
        named = dict(zip(contenders, OURS, strict=True))
        launches.append([{named[one]: found for one, found in turn.items()} for turn in turns])
    return launches


def main() -> None:
    """Run the contenders and print what came out."""
    options = parser(__doc__)
    options.add_argument("--shape", choices=SHAPES, default="S")
    options.add_argument("--against", choices=["hf"], default="hf", help="the peer")
    options.add_argument(
        "--overhead", action="store_true", help="our trainer beside a bare loop of the same step"
    )
    add_turns(options)
    add_checkout(options)
    args = options.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    device = choose_device(args.device)
    names = CONTENDERS["overhead" if args.overhead else args.against]
    arguments = {**SHAPES[args.shape], "device": str(device)}
    if args.checkout is not None:
        names = OURS
        launches = launches_with_checkout(arguments, args)
    else:
        turns = by_turns([Contender(name, arguments) for name in names], args.rounds, args.seconds)
        launches = [[{one.name: answer for one, answer in turn.items()} for turn in turns]]
    result = {
        "benchmark": "train_speed",
        "shape": args.shape,
        "setting": setting(),
        **summarize(names, launches),
        **utilization(names, launches, SHAPES[args.shape], device),
    }
    show(result, describe(result), args.json)


def summarize(names: tuple[str, ...], launches: list[Turns]) -> dict[str, dict[str, Any]]:
    """Tokens per second, how many times the others' ours are, and peak memory in MiB.

    The interval is that of the medians of launches where there are several, else of the rounds: a
    neighbour that takes the cores for one turn moves a mean by percents.
    """
    taken = list(chain.from_iterable(launches))
    speeds = {name: [turn[name]["tokens_per_second"] for turn in taken] for name in names}
    ours = speeds[names[0]]

    def step_time_ratios(other: str) -> list[float]:
        ratios = [
            [turn[other]["tokens_per_second"] / turn[names[0]]["tokens_per_second"] for turn in one]
            for one in launches
        ]
        return ratios[0] if len(ratios) == 1 else [*map(statistics.median, ratios)]

    return {
        "tokens_per_second": {name: spread(figures) for name, figures in speeds.items()},
        "ratio": {
            name: statistics.median(a / b for a, b in zip(ours, speeds[name], strict=True))
            for name in names[1:]
        },
        "step_time_ratio": {name: ratio_interval(step_time_ratios(name)) for name in names[1:]},
        "peak_memory_mib": {name: taken[-1][name]["peak_memory_mib"] for name in names},
    }


def utilization(
    names: tuple[str, ...], launches: list[Turns], shape: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """The share of the device's dense peak that each contender's arithmetic uses (MFU)."""
    precision, _ = choose_precision("auto", device)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    peak = peak_flops(device, precision)
    per_token = flops_per_token(ModelConfig(**shape["model"]), shape["seq_len"])
    taken = list(chain.from_iterable(launches))
    medians = {
        name: statistics.median(t[name]["tokens_per_second"] for t in taken) for name in names
    }
    return {
        "peak_flops": peak,
        "peak_precision": precision,
        "mfu": {name: median * per_token / peak for name, median in medians.items()},
    }


def describe(result: dict[str, Any]) -> str:
    """The result as a table."""
    ratios = result["ratio"]
    lines = [
        (
            name,
            f"{speed['median']:,.0f}",
            f"{speed['low']:,.0f}",
            f"{speed['high']:,.0f}",
            f"{ratios[name]:.3g}x" if name in ratios else "",
            f"{result['mfu'][name]:.0%}",
            f"{result['peak_memory_mib'][name]:,.0f}",
        )
        for name, speed in result["tokens_per_second"].items()
    ]
    header = ("", "tokens/s", "low", "high", "ours is", "MFU", "peak MiB")
    peak = f"{result['peak_flops'] / 1e9:,.0f} GFLOP/s in {result['peak_precision']}"
    table = f"shape {result['shape']}; peak {peak}\n{rows(header, lines)}"
    checkout = result["step_time_ratio"].get(OURS[1])
    if checkout is not None:
        table += (
            f"\nstep time over the checkout's: {checkout['mean']:.4f} "
            f"(95% interval {checkout['low_95']:.4f} to {checkout['high_95']:.4f})"
        )
    return table


if __name__ == "__main__":
    start(main)
