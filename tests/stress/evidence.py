"""What shows that a run which was killed equals one that was not: every logged line, every bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ultrathink.checkpoint.format import verify_checkpoint
from ultrathink.core.errors import UltrathinkError

Row = dict[str, Any]
EXPERTS = "experts.jsonl"

# What the clock and the machine decide, and what a run is called. The number of loader workers may
# differ too: it has no bearing on anything.
_LEFT_OUT_OF_ROWS = {
    *("time", "tokens_per_sec", "mfu", "memory_gib", "data_wait"),
    *("communication_share", "compute_s_fastest", "compute_s_slowest"),
}
_LEFT_OUT_OF_STATE = {
    "progress/elapsed_s",
    "progress/last_checkpoint_s",
    "config/run",
    "config/data/num_workers",
}
# Events that say how fast and how full this machine was.
_MACHINE_KINDS = (
    *("memory_pressure", "memory_leak", "memory_fragmentation"),
    *("starving_loader", "throughput_drop", "slow_step"),
)
_OF_THE_MACHINE = ("LiveWatch/detectors/Memory", "LiveWatch/detectors/Throughput")


def differences(reference: Path, other: Path) -> list[str]:
    """Where run folder ``other`` differs from ``reference``, in words; empty where it does not.

    Compared are all lines of metrics.jsonl and, where there is one, experts.jsonl, the tensors (bit
    for bit) and state.json of ``last`` and ``best``, which checkpoints there are, and what was left
    lying about. Times and rates are left out.
    """
    found = row_differences(rows(reference), rows(other))
    experts = [rows(run, EXPERTS) if (run / EXPERTS).exists() else [] for run in (reference, other)]
    found += row_differences(*experts, EXPERTS)
    found += _listing_differences(reference, other)
    for name in ("last", "best"):
        here, there = reference / "checkpoints" / name, other / "checkpoints" / name
        if here.exists() and there.exists():
            found += [f"{name}: {text}" for text in checkpoint_differences(here, there)]
    found += [f"left behind: {name}" for name in sorted(hidden(other) - hidden(reference))]
    return found


def rows(run: Path, name: str = "metrics.jsonl") -> list[Row]:
    """The lines of a file of metrics without times and rates."""
    text = (run / name).read_text(encoding="utf-8")
    return [
        {key: value for key, value in json.loads(line).items() if key not in _LEFT_OUT_OF_ROWS}
        for line in text.splitlines()
    ]


def row_differences(
    reference: list[Row], other: list[Row], name: str = "metrics.jsonl"
) -> list[str]:
    """Which logged lines differ, each named by its number, step and first field that differs."""
    found = []
    for number, (here, there) in enumerate(zip(reference, other, strict=False), start=1):
        if here != there:
            key = next(k for k in [*here, *there] if here.get(k) != there.get(k))
            found.append(
                f"{name} line {number} (step {here['step']}, {here.get('split', 'train')}): "
                f"{key} is {here.get(key)!r} undisturbed, {there.get(key)!r} after the kills"
            )
    if len(reference) != len(other):
        found.append(f"{name} has {len(reference)} lines undisturbed, {len(other)} here")
    return found


def checkpoint_differences(reference: Path, other: Path) -> list[str]:
    """Where two checkpoints differ in a tensor's bits or in state.json."""
    here, there = tensors(reference), tensors(other)
    found = [f"only one of them has tensor {name}" for name in sorted(set(here) ^ set(there))]
    found += [
        f"tensor {name} differs"
        for name in sorted(set(here) & set(there))
        if not _same_bits(here[name], there[name])
    ]
    return found + list(_value_differences(_state(reference), _state(other)))


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint; later shards of one are named with their file."""
    found: dict[str, Tensor] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            found[f"{name} ({file.name})" if name in found else name] = tensor
    assert found, f"{checkpoint} holds no tensors"
    return found


def steps(run: Path) -> list[int]:
    """The steps of the visible checkpoints, sound or not, oldest first."""
    return sorted(int(folder.name.removeprefix("step_")) for folder in _visible(run))


def unsound(run: Path) -> list[str]:
    """What is wrong with the visible checkpoints and the links to them; empty when all is well."""
    found = []
    for folder in _visible(run):
        try:
            verify_checkpoint(folder)
        except UltrathinkError as error:
            found.append(str(error))
    for name in ("last", "best"):
        link = run / "checkpoints" / name
        if link.is_symlink() and not (link / "state.json").is_file():
            found.append(f"{name} points to {link.readlink()}, which holds no checkpoint")
    return found


def best_step(run: Path, until: int) -> int:
    """The step that ``best`` has to stand for after step ``until``, by the logged lines; or 0."""
    metrics = run / "metrics.jsonl"
    best, lowest = 0, float("inf")
    for line in metrics.read_bytes().split(b"\n")[:-1] if metrics.is_file() else ():
        row = json.loads(line)
        if row["split"] == "val" and row["step"] <= until and row["loss"] < lowest:
            best, lowest = row["step"], row["loss"]
    return best


def hidden(run: Path) -> set[str]:
    """Names of hidden and temporary entries, which a finished run has no use for."""
    return {
        str(path.relative_to(run))
        for path in run.rglob("*")
        if path.name.startswith(".") or path.name.endswith(".tmp")
    }


def _visible(run: Path) -> list[Path]:
    folder = run / "checkpoints"
    found = sorted(folder.glob("step_*")) if folder.is_dir() else []
    return [path for path in found if path.name.removeprefix("step_").isdigit()]


def _listing_differences(reference: Path, other: Path) -> Iterator[str]:
    def listing(run: Path) -> list[str]:
        entries = [path for path in (run / "checkpoints").iterdir() if path.name[0] != "."]
        return sorted(
            f"{path.name} -> {path.readlink()}" if path.is_symlink() else path.name
            for path in entries
        )

    here, there = listing(reference), listing(other)
    if here != there:
        yield f"checkpoints/ holds {here} undisturbed, {there} after the kills"


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(_bytes(one), _bytes(other))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _state(checkpoint: Path) -> Any:
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["state"]
    incidents = state.get("callback.LiveWatch", {}).get("incidents")
    if incidents is not None:
        incidents["events"] = [e for e in incidents["events"] if e["kind"] not in _MACHINE_KINDS]
        incidents["open"] = {
            key: kept
            for key, kept in incidents["open"].items()
            if key.partition("/")[0] not in _MACHINE_KINDS
        }
    return state


def _value_differences(here: Any, there: Any, path: str = "") -> Iterator[str]:
    if path in _LEFT_OUT_OF_STATE or path.endswith(_OF_THE_MACHINE):
        return
    if isinstance(here, dict) and isinstance(there, dict):
        for key in [*here, *(key for key in there if key not in here)]:
            below = f"{path}/{key}" if path else key
            if key in here and key in there:
                yield from _value_differences(here[key], there[key], below)
            elif {**here, **there}[key] != {}:  # a part without a state need not be there
                yield f"state.json: only one of them has {below}"
    elif isinstance(here, list) and isinstance(there, list) and len(here) == len(there):
        for number, pair in enumerate(zip(here, there, strict=True)):
            yield from _value_differences(*pair, f"{path}/{number}")
    elif here != there:
        yield (f"state.json: {path} is {_short(here)} undisturbed, {_short(there)} after the kills")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."
