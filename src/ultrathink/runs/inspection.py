"""Lists the content of a checkpoint, and consolidates its weights into one file."""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultrathink.checkpoint.format import (
    MODEL,
    DamagedCheckpointError,
    Kind,
    holding,
    load_checkpoint,
    read_few,
    read_header,
    read_state,
    tensor_shapes,
    weights,
)
from ultrathink.checkpoint.snapshots import embedded_steps, snapshot_path
from ultrathink.config.experts import MoeConfig
from ultrathink.core.errors import CheckpointError
from ultrathink.core.files import new_folder
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.listing import size_on_disk

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_FILE = "model.safetensors"
# What is not trained: live controls of routing, and the routers' buffers.
_BUFFERS = re.compile(r"/routing\.|\.router\.(?!weight$)")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    size_bytes: int
    num_shards: int  # files that hold shards of it


@dataclass(frozen=True)
class Contents:
    """The content of a checkpoint."""

    folder: Path
    kind: Kind
    base: str | None  # hash of the model that an adapter belongs to
    step: int
    tokens: int
    minutes: float
    num_processes: int  # that wrote it
    size_bytes: int
    files: dict[str, int]  # bytes by name
    tensors: tuple[TensorInfo, ...]
    optimizer: str
    snapshots: dict[int, int]  # embedded ones: bytes by step
    experts: dict[str, dict[int, int]]  # how many there are, by group and layer
    num_slots: dict[int, int]  # for experts, by layer

    @property
    def num_parameters(self) -> int:
        """The number of weights in the model, without those of empty slots."""
        return self._count(MODEL) - self.num_empty

    @property
    def num_empty(self) -> int:
        """The number of weights in slots without an expert."""
        empty = 0
        for layer, num_slots in self.num_slots.items():
            place = f"{MODEL}blocks.{layer}.feed_forward."
            in_slots = self._count(f"{place}experts.", f"{place}router.weight")
            there = sum(counts[layer] for counts in self.experts.values())
            empty += in_slots // num_slots * (num_slots - there)
        return empty

    def _count(self, *prefixes: str) -> int:
        """The number of weights in tensors whose names begin so."""
        return sum(
            math.prod(one.shape)
            for one in self.tensors
            if one.name.startswith(prefixes) and not _BUFFERS.search(one.name)
        )


def inspect_checkpoint(folder: Path) -> Contents:
    """The content of a checkpoint, without reading its tensors; raises CheckpointError."""
    state, header = read_state(folder), read_header(folder)
    shards = holding(folder)
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    tensors = tuple(
        TensorInfo(
            name,
            shape,
            str(dtype).removeprefix("torch."),
            math.prod(shape) * dtype.itemsize,
            len(shards[name]),
        )
        for name, (shape, dtype) in sorted(tensor_shapes(folder).items())
    )
    progress = state["progress"]
    experts, num_slots = _experts(folder, state["config"].get("model", {}).get("moe"))
    return Contents(
        folder=folder,
        kind=header.kind,
        base=header.base,
        step=progress["step"],
        tokens=progress["tokens"],
        minutes=progress["elapsed_s"] / 60,
        num_processes=max([1, *(int(name.split("-")[1]) for name in files if "shard-" in name)]),
        size_bytes=sum(files.values()),
        files=files,
        tensors=tensors,
        optimizer=state["config"]["training"]["optimizer"]["type"],
        snapshots={
            step: size_on_disk(snapshot_path(folder, step)) for step in embedded_steps(state)
        },
        experts=experts,
        num_slots=num_slots,
    )


def _experts(
    folder: Path, moe: dict[str, Any] | None
) -> tuple[dict[str, dict[int, int]], dict[int, int]]:
    """The experts that there are, by group and layer, and the slots of each layer."""
    if moe is None:
        return {}, {}
    groups = MoeConfig.model_validate(moe).groups
    counts: dict[str, dict[int, int]] = {group.name: {} for group in groups}
    num_slots: dict[int, int] = {}
    found = read_few(folder, lambda name: weights(name) and name.endswith(".router.active"))
    for name, active in found.items():
        layer = int(name.split("blocks.")[1].split(".")[0])
        parts = active.split([group.num_slots for group in groups])
        for group, part in zip(groups, parts, strict=True):
            counts[group.name][layer] = int(part.sum())
        num_slots[layer] = len(active)
    return {name: dict(sorted(of.items())) for name, of in counts.items()}, num_slots


def read_weights_file(path: Path) -> dict[str, Tensor]:
    """The weights that ``consolidate`` wrote; raises DamagedCheckpointError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise DamagedCheckpointError(
            path.parent, f"{path.name} cannot be read ({error})", "Consolidate the run again."
        ) from None


def consolidate(run: RunFolder, checkpoint: str, output: Path | None = None) -> tuple[Path, str]:
    """Write the weights of a run's checkpoint as one file, with configuration and tokenizer.

    Returns the folder, by default ``RUN/consolidated/STEP``, and a remark if another checkpoint
    had to be used (else ""). The folder is complete or absent. Raises CheckpointError if it exists
    already.
    """
    from safetensors.torch import save_file

    folder, notes = run.sound_checkpoint(checkpoint, weights)
    target = output or run.path / "consolidated" / folder.name
    if target.exists():
        raise CheckpointError(
            f"{target} exists already and is not overwritten; delete it, or name another folder "
            f"with --output."
        )
    state: dict[str, Any] = dict(load_checkpoint(folder, weights))
    with new_folder(target) as beside:
        save_file(state["model"], beside / WEIGHTS_FILE, metadata={"format": "pt"})
        RunFolder(beside).write_config(run.read_config())
        shutil.copytree(run.tokenizer, beside / "tokenizer")
    return target, "; ".join(notes)
