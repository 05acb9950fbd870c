"""One run on more processes: what each adds, what communication takes, beside plain FSDP2 code.

    python benchmarks/scale.py --shape S
    python benchmarks/scale.py --shape S --processes 2 --zero-stage 2 --json

The same global batch is trained by one process, by several through our whole trainer, and by as
many in a bare loop that a person would write with FSDP2: the same model, compiled block by block,
`fully_shard` on each block and on the model, bf16 with gradients summed in fp32, fused AdamW. Each
process computes with its part of the cores (of a CPU) or with its own GPU. All alternate,
in the same minutes. Communication is what our trainer counts: where it blocks a process of a CPU.
"""

from __future__ import annotations

import os
import statistics
from typing import Any

from harness import Contender, by_turns, parser, rows, setting, show, spread, start
from train_speed import SHAPES

from ultrathink.core.errors import UltrathinkError
from ultrathink.training.hardware import choose_device


def main() -> None:
    """Run the contenders and print what came out."""
    options = parser(__doc__)
    options.add_argument("--shape", choices=SHAPES, default="S")
    options.add_argument("--processes", type=int, default=2)
    options.add_argument("--zero-stage", type=int, choices=[1, 2, 3], default=3)
    options.add_argument("--device", default="auto")
    options.add_argument("--rounds", type=int, default=6)
    options.add_argument("--seconds", type=float, default=5.0, help="of training in each turn")
    args = options.parse_args()
    device = choose_device(args.device)
    shape = {**SHAPES[args.shape], "device": str(device)}
    if args.processes < 2 or shape["batch_size"] % args.processes:
        raise UltrathinkError(
            f"--processes {args.processes}: give 2 or more that divide the batch of "
            f"{shape['batch_size']}."
        )
    several = {**shape, "processes": args.processes, "zero_stage": args.zero_stage}
    cores = os.cpu_count() or 1
    names = {
        "one process": ("ultrathink", shape, cores),
        f"{args.processes} processes": ("ultrathink_together", several, cores // args.processes),
        "plain FSDP2": ("plain_fsdp2", several, cores // args.processes),
    }
    contenders = {}
    for name, (entry, arguments, threads) in names.items():
        os.environ["OMP_NUM_THREADS"] = str(max(1, threads))
        contenders[Contender(entry, arguments)] = name
    turns = by_turns(list(contenders), args.rounds, args.seconds)
    taken = [{contenders[one]: answer for one, answer in turn.items()} for turn in turns]
    result = {
        "benchmark": "scale",
        "shape": args.shape,
        "processes": args.processes,
        "zero_stage": args.zero_stage,
        "setting": {**setting(), "threads": cores},
        **summarize(list(names), taken, args.processes),
    }
    show(result, describe(result), args.json)


def summarize(
    names: list[str], taken: list[dict[str, dict[str, float]]], processes: int
) -> dict[str, Any]:
    """Tokens per second, in all and for each process, and what was asked beside them."""
    one, ours, plain = names
    speeds = {name: [turn[name]["tokens_per_second"] for turn in taken] for name in names}
    shares = [turn[ours]["communication_share"] for turn in taken]
    return {
        "tokens_per_second": {name: spread(figures) for name, figures in speeds.items()},
        "per_process": {
            name: statistics.median(figures) / (1 if name == one else processes)
            for name, figures in speeds.items()
        },
        "beside_plain": statistics.median(
            a / b for a, b in zip(speeds[ours], speeds[plain], strict=True)
        ),
        "beside_one": statistics.median(
            a / b for a, b in zip(speeds[ours], speeds[one], strict=True)
        ),
        "communication_share": statistics.median(shares),
        "peak_memory_mib": {name: taken[-1][name]["peak_memory_mib"] for name in names},
    }


def describe(result: dict[str, Any]) -> str:
    """The result as a table."""
    lines = [
        (
            name,
            f"{speed['median']:,.0f}",
            f"{speed['low']:,.0f}",
            f"{speed['high']:,.0f}",
            f"{result['per_process'][name]:,.0f}",
            f"{result['peak_memory_mib'][name]:,.0f}",
        )
        for name, speed in result["tokens_per_second"].items()
    ]
    header = ("", "tokens/s", "low", "high", "each process", "peak MiB of one")
    return (
        f"shape {result['shape']}, ZeRO-{result['zero_stage']}\n{rows(header, lines)}\n"
        f"{result['processes']} processes are {result['beside_one']:.3f} of one, and "
        f"{result['beside_plain']:.3f} of plain FSDP2; communication takes "
        f"{result['communication_share']:.0%} of their time"
    )


if __name__ == "__main__":
    start(main)
