"""What training and running several paths costs: whole steps and decoding, by turns.

    python benchmarks/elastic_speed.py
    python benchmarks/elastic_speed.py --only decode --json

Steps: the preset `demo-elastic` as it is, beside the same that trains the whole model alone, in the
real trainer with bf16 where the machine has it. Decoding: each path of one untrained model of that
shape generates from a batch of 8 prompts, by turns, eager, with a cache. A path's time is compared
with its share of the whole model's operations.
"""

from __future__ import annotations

import os
import statistics
import time
from typing import Any

import torch
from harness import (
    Contender,
    add_turns,
    by_turns,
    parser,
    ratio_interval,
    rows,
    setting,
    show,
    start,
)

from ultrathink.config import load_config
from ultrathink.model.flops import flops_per_token
from ultrathink.model.transformer import Transformer
from ultrathink.training.hardware import choose_device, choose_precision

PRESET = "demo-elastic"
PATHS = ("fast", "standard", "expert", "deep", "ultra_deep")
STEPS = {
    "whole model": "training.objective=pretrain",
    "exits": "training.objective={type: elastic, sub_paths: null}",
    "exits and sub-paths": "training.objective={type: elastic}",
}
PROMPT, NEW, BATCH = 32, 64, 8


def main() -> None:
    """Measure steps and decoding, and print what came out."""
    options = parser(__doc__)
    options.add_argument("--only", choices=("steps", "decode"))
    add_turns(options)
    args = options.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {"benchmark": "elastic_speed", "setting": setting()}
    if args.only != "decode":
        result["steps"] = steps(args.device, args.rounds, args.seconds)
    if args.only != "steps":
        result["paths"] = decoding(args.device, args.rounds)
    show(result, describe(result), args.json)


def steps(device: str, rounds: int, seconds: float) -> dict[str, Any]:
    """Step times of the objectives over that of the whole model alone."""
    config = load_config(PRESET)
    shape = {
        "model": {**config.model.model_dump(mode="json"), "vocab_size": config.tokenizer.size()},
        "seq_len": config.data.seq_len,
        "batch_size": config.training.batch_size,
        "device": str(choose_device(device)),
    }
    contenders = [
        Contender("ultrathink", {**shape, "overrides": [words, "training.compile=true"]})
        for words in STEPS.values()
    ]
    labels = dict(zip(contenders, STEPS, strict=True))
    taken = [
        {labels[one]: answer["tokens_per_second"] for one, answer in turn.items()}
        for turn in by_turns(contenders, rounds, seconds)
    ]
    first = next(iter(STEPS))
    return {
        name: {
            "tokens_per_second": statistics.median(turn[name] for turn in taken),
            "step_time_ratio": ratio_interval([turn[first] / turn[name] for turn in taken]),
        }
        for name in STEPS
    }


@torch.inference_mode()
def decoding(device: str, rounds: int) -> dict[str, Any]:
    """Seconds of decoding on each path, over those of the whole model."""
    place = choose_device(device)
    config = load_config(PRESET)
    model = Transformer(config.model).to(place).eval()
    if choose_precision("auto", place)[0] == "bf16":
        model = model.to(torch.bfloat16)
    prompt = torch.randint(config.tokenizer.size(), (BATCH, PROMPT), device=place)
    seconds: dict[str, list[float]] = {path: [] for path in PATHS}
    for number in range(rounds + 1):
        for path in PATHS if number % 2 else reversed(PATHS):
            cache = model.new_cache(BATCH, PROMPT + NEW)
            model(prompt, cache=cache, path=path, last_only=True)
            began = time.perf_counter()
            for _ in range(NEW):
                model(prompt[:, :1], cache=cache, path=path, last_only=True)
            if place.type == "cuda":
                torch.cuda.synchronize(place)
            if number:  # the first is to warm up
                seconds[path].append(time.perf_counter() - began)
    whole = flops_per_token(config.model, PROMPT + NEW)
    return {
        path: {
            "tokens_per_second": BATCH * NEW / statistics.median(taken),
            "time": statistics.median(
                mine / deep for mine, deep in zip(taken, seconds["deep"], strict=True)
            ),
            "flops": flops_per_token(config.model, PROMPT + NEW, path) / whole,
        }
        for path, taken in seconds.items()
    }


def describe(result: dict[str, Any]) -> str:
    """Two tables."""
    found = []
    if "steps" in result:
        lines = []
        for name, figures in result["steps"].items():
            ratio = figures["step_time_ratio"]
            interval = f"{ratio['low_95']:.3f} to {ratio['high_95']:.3f}"
            lines.append(
                (name, f"{figures['tokens_per_second']:,.0f}", f"{ratio['mean']:.3f}", interval)
            )
        found.append(rows(("step", "tokens/s", "time", "95% interval"), lines))
    if "paths" in result:
        lines = [
            (
                path,
                f"{figures['tokens_per_second']:,.0f}",
                f"{figures['time']:.2f}",
                f"{figures['flops']:.2f}",
                f"{figures['time'] / figures['flops']:.2f}",
            )
            for path, figures in result["paths"].items()
        ]
        found.append(rows(("decoding", "tokens/s", "time", "FLOPs", "time / FLOPs"), lines))
    return "\n\n".join(found)


if __name__ == "__main__":
    start(main)
