"""``ultrathink export``: write a run's model for other programs."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from ultrathink.core.errors import UltrathinkError

if TYPE_CHECKING:
    from ultrathink.interop.export import Export

EPILOG = """examples:
  ultrathink export demo                  below runs/demo/export/
  ultrathink export demo --checkpoint last --dtype bf16
                                          half the size
  ultrathink export demo@500 --output my-model
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``ultrathink export``."""
    parser.add_argument("run", metavar="RUN", help="run name or folder, or RUN@best|last|step")
    parser.add_argument(
        "--checkpoint", metavar="best|last|STEP", help="which of its checkpoints (default: best)"
    )
    parser.add_argument(
        "--format",
        choices=["hf"],
        default="hf",
        help="hf: a folder that transformers loads (default: hf)",
    )
    parser.add_argument(
        "--output", metavar="FOLDER", help="a new folder (default: RUN/export/hf-STEP)"
    )
    parser.add_argument(
        "--dtype", choices=["fp32", "bf16"], help="type of the weights (default: their own)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Write the folder, and print how to load it."""
    from ultrathink.interop.export import export_run
    from ultrathink.runs.folder import split_run

    name, named = split_run(args.run, "")
    if named and args.checkpoint is not None:
        raise UltrathinkError(
            f"{args.run} and --checkpoint {args.checkpoint} both name a checkpoint; give one."
        )
    checkpoint = named or args.checkpoint or "best"
    done = export_run(name, checkpoint, output=args.output, dtype=args.dtype)
    for remark in done.remarks:
        print(f"note: {remark}", file=sys.stderr)
    if args.json:
        print(json.dumps(_as_json(done)))
    else:
        _say(done)
    return 0


def _as_json(done: Export) -> dict[str, object]:
    return {
        "run": str(done.run),
        "checkpoint": str(done.checkpoint),
        "step": done.step,
        "format": "hf",
        "path": str(done.folder),
        "model_type": done.model_type,
        "dtype": done.dtype,
        "tokenizer_class": done.tokenizer_class,
        "remarks": list(done.remarks),
    }


def _say(done: Export) -> None:
    place = str(done.folder)
    print(f"Step {done.step:,} of {done.run}, a {done.model_type} in {done.dtype}: {place}")
    print("  load it:")
    needed = ["AutoModelForCausalLM", *([done.tokenizer_class] if done.tokenizer_class else [])]
    print(f"    from transformers import {', '.join(needed)}")
    print(f"    model = AutoModelForCausalLM.from_pretrained({place!r})")
    if done.tokenizer_class:
        print(f"    tokenizer = {done.tokenizer_class}.from_pretrained({place!r})")
        print(f"  train on:  ultrathink train training.init_from=hf:{place}")
