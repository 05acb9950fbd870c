"""``ultrathink checkpoint``: its contents, and its model as one file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from ultrathink.cli.arguments import generate_command
from ultrathink.core.errors import UltrathinkError, closest
from ultrathink.core.streams import print_stderr
from ultrathink.runs.folder import find_run, split_run
from ultrathink.runs.inspection import Contents, consolidate, inspect_checkpoint

ACTIONS = ("info", "consolidate")
EPILOG = """what to do:
  checkpoint info RUN           list what the last checkpoint of a run holds
  checkpoint consolidate RUN    write its model as one safetensors file, with
                                its configuration and tokenizer

examples:
  ultrathink checkpoint info demo
  ultrathink checkpoint info demo@500 --tensors
  ultrathink checkpoint consolidate demo@best --output demo-model
  ultrathink generate demo-model "def main():"
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``ultrathink checkpoint``."""
    parser.add_argument("action", metavar="ACTION", help="info or consolidate")
    parser.add_argument("run", metavar="RUN", help="run name or folder, or RUN@best|last|step")
    parser.add_argument("--tensors", action="store_true", help="info: list every tensor")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="consolidate: where to")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """List what a checkpoint holds, or write its model."""
    if args.action not in ACTIONS:
        near = closest(args.action, ACTIONS)
        hint = f"did you mean {near}?" if near else f"use {' or '.join(ACTIONS)}."
        raise UltrathinkError(f"there is no action {args.action!r}; {hint}")
    name, which = split_run(args.run)
    found = find_run(name)
    if args.action == "info":
        contents = inspect_checkpoint(found.checkpoint(which))
        _show(contents, with_tensors=args.tensors, as_json=args.json)
        return 0
    folder, remark = consolidate(found, which, args.output)
    if remark:
        print_stderr(f"warning: {remark}")
    if args.json:
        print(json.dumps({"folder": str(folder)}))
    else:
        prompts = found.read_config().training.sample.prompts
        print(f"Written: {folder}\n  let it write:  {generate_command(folder, prompts)}")
    return 0


def _show(contents: Contents, *, with_tensors: bool, as_json: bool) -> None:
    if as_json:
        tensors = [
            {"name": t.name, "shape": list(t.shape), "dtype": t.dtype, "shards": t.num_shards}
            for t in contents.tensors
        ]
        plain = {
            "folder": str(contents.folder),
            "kind": contents.kind,
            "base": contents.base,
            "step": contents.step,
            "tokens": contents.tokens,
            "minutes": contents.minutes,
            "processes": contents.num_processes,
            "parameters": contents.num_parameters,
            "experts": contents.experts,
            "optimizer": contents.optimizer,
            "size_bytes": contents.size_bytes,
            "files": contents.files,
            "snapshots": [
                {"step": step, "size_bytes": size} for step, size in contents.snapshots.items()
            ],
            "tensors": tensors,
        }
        print(json.dumps(plain))
        return
    writers = f"{contents.num_processes} process{'es' if contents.num_processes > 1 else ''}"
    adds_to = f" for the model {contents.base[:12]}" if contents.base is not None else ""
    print(
        f"{contents.folder}: {contents.kind}{adds_to}\n"
        f"  step {contents.step:,}, {contents.tokens:,} tokens, {contents.minutes:.1f} minutes\n"
        f"  {contents.num_parameters:,} parameters, optimizer {contents.optimizer}, written by "
        f"{writers}\n"
        f"  {contents.size_bytes / 2**20:.1f} MiB in {len(contents.files)} files:"
    )
    for name, size in contents.files.items():
        print(f"    {size / 2**20:8.1f} MiB  {name}")
    for line in _experts(contents):
        print(f"  {line}")
    if contents.snapshots:
        print(
            f"  snapshots for rollbacks, {sum(contents.snapshots.values()) / 2**20:.1f} MiB, which "
            f"checkpoints share: step {', '.join(map(str, contents.snapshots))}"
        )
    if with_tensors:
        print(f"  {len(contents.tensors)} tensors:")
        for tensor in contents.tensors:
            shards = f"  in {tensor.num_shards} shards" if tensor.num_shards > 1 else ""
            print(f"    {tensor.dtype:<9} {list(tensor.shape)!s:<14} {tensor.name}{shards}")


def _experts(contents: Contents) -> Iterator[str]:
    """The experts of each group; layers with the same number of them together."""
    for group, counts in contents.experts.items():
        layers: dict[int, list[str]] = {}
        for layer, count in counts.items():
            layers.setdefault(count, []).append(str(layer))
        if len(layers) == 1:
            yield f"experts of group {group}: {next(iter(layers))} in each layer"
            continue
        listed = "; ".join(
            f"{count} in layer{'s' * (len(of) > 1)} {', '.join(of)}" for count, of in layers.items()
        )
        yield f"experts of group {group}: {listed}"
    if contents.num_empty:
        yield f"empty slots for experts: {contents.num_empty:,} further numbers, all zero"
