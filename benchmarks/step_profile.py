"""Where a compiled training step spends its time, kernel by kernel.

    python benchmarks/step_profile.py --shape S
    python benchmarks/step_profile.py --shape M --top 40 --json

On a CPU the compiler names each kernel for the profiler. The kind of a kernel follows from the
operations in its name; all others are `other`.
"""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from contenders import config_of
from harness import parser, rows, setting, show, start
from torch.profiler import ProfilerActivity, profile
from train_speed import SHAPES

from ultrathink import build_trainer

# The first whose words are all in a kernel's name.
KINDS = (
    ("products of matrices", ("aten::mm",)),
    ("products in attention, and of experts on a CPU", ("aten::bmm",)),
    ("products of experts", ("aten::_grouped_mm",)),
    ("calls of experts' products, and where rows lie", ("ultrathink::",)),
    ("router, its losses, and rows of experts", ("masked_fill",)),
    ("router, its losses, and rows of experts", ("clamp", "log")),
    ("rows and weights of experts", ("grouped",)),
    ("sums over a token's experts", ("embedding_bag",)),
    ("softmax of attention, forward", ("amax",)),
    ("softmax and loss of the head", ("logsumexp",)),
    ("SwiGLU", ("silu",)),
    ("rotary embedding", ("split_with_sizes",)),
    ("rotary embedding", ("cat", "neg")),
    ("norms and residuals", ("rsqrt",)),
    ("norms and residuals", ("pow",)),
    ("optimizer", ("adamw",)),
    ("optimizer", ("AdamW",)),
    ("gradient norm and clipping", ("vector_norm",)),
    ("gradient norm and clipping", ("aten::mul_",)),
    ("copies for products in attention", ("aten::copy_",)),
    ("launching kernels", ("Call CompiledFxGraph",)),
)
WARM_STEPS, STEPS = 6, 8


def main() -> None:
    """Profile some steps and print what they spent."""
    options = parser(__doc__)
    options.add_argument("--shape", choices=SHAPES, default="S")
    options.add_argument("--device", default="cpu")
    options.add_argument("--top", type=int, default=0, help="list so many kernels as well")
    options.add_argument("--threads", type=int, default=os.cpu_count())
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    if args.device == "cpu":
        import torch._inductor.config as inductor

        inductor.cpp.enable_kernel_profile = True
    kernels = profile_kernels(args.shape, args.device)
    kinds: dict[str, float] = defaultdict(float)
    for name, milliseconds in kernels.items():
        kinds[kind_of(name)] += milliseconds
    result = {
        "benchmark": "step_profile",
        "shape": args.shape,
        "setting": setting(),
        "ms_by_kind": dict(sorted(kinds.items(), key=lambda item: -item[1])),
        "ms_by_kernel": dict(list(kernels.items())[: args.top]),
    }
    show(result, describe(result), args.json)


def profile_kernels(shape: str, device: str) -> dict[str, float]:
    """Milliseconds of a step by kernel, the longest first."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(config_of({**SHAPES[shape], "device": device}, folder))
        trainer.model.train()

        def step() -> None:
            trainer.stepper.take_step(trainer.loader.next_batch(), trainer.settings, 1.0)

        repeat(step, WARM_STEPS)
        activities = [ProfilerActivity.CPU]
        if device != "cpu":
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities) as profiler:
            repeat(step, STEPS)
        trainer.close()
    spent = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, spent))
    return {event.key: getattr(event, spent) / 1000 / STEPS for event in events}


def repeat(work: Callable[[], object], times: int) -> None:
    """Do it so many times."""
    for _ in range(times):
        work()


def kind_of(kernel: str) -> str:
    """What a kernel is for."""
    return next((kind for kind, words in KINDS if all(word in kernel for word in words)), "other")


def describe(result: dict[str, Any]) -> str:
    """The result as a table."""
    by_kind = result["ms_by_kind"]
    total = sum(by_kind.values())
    lines = [(kind, f"{ms:.1f}", f"{ms / total:.0%}") for kind, ms in by_kind.items()]
    lines += [("sum", f"{total:.1f}", "")]
    text = f"shape {result['shape']}\n{rows(('', 'ms/step', 'share'), lines)}"
    kernels = [(name[:90], f"{ms:.2f}") for name, ms in result["ms_by_kernel"].items()]
    return f"{text}\n\n{rows(('kernel', 'ms/step'), kernels)}" if kernels else text


if __name__ == "__main__":
    start(main)
