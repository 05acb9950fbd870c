"""Loads a model and its tokenizer from a run folder."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ultrathink.checkpoint.format import (
    MODEL,
    Kind,
    check_kind,
    load_checkpoint,
    read_state,
    tensor_shapes,
    weights,
)
from ultrathink.config.experts import MoeConfig
from ultrathink.config.model import ModelConfig
from ultrathink.core.errors import CheckpointError
from ultrathink.data.tokenizers.base import Tokenizer, load_tokenizer
from ultrathink.model.transformer import Transformer
from ultrathink.runs.folder import RunFolder, find_run, split_run
from ultrathink.runs.inspection import WEIGHTS_FILE, read_weights_file

if TYPE_CHECKING:
    from os import PathLike


def load_model(
    run: str | PathLike[str],
    checkpoint: str | int = "best",
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> tuple[Transformer, Tokenizer]:
    """The model of a run's checkpoint, in evaluation mode, and its tokenizer.

    ``run`` may also be a folder written by ``ultrathink checkpoint consolidate``.
    ``checkpoint`` is ``"best"``, ``"last"`` or a step; ``dtype`` converts the weights. Warns if the
    best or last is damaged and an earlier one is used instead. Raises CheckpointError if something
    is missing, damaged or does not fit.
    """
    folder = find_run(str(run))
    is_consolidated = (folder.path / WEIGHTS_FILE).is_file()
    path = folder.path if is_consolidated else _sound_model(folder, checkpoint)
    model = empty_model(folder.read_config().model)
    load_weights(model, path)
    if dtype is not None:
        model.to(dtype)
    return model.to(device).eval(), load_tokenizer(folder.tokenizer)


def empty_model(config: ModelConfig) -> Transformer:
    """A model on the CPU with uninitialized weights."""
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device="cpu")
    model.reset_buffers()
    return model


def load_weights(model: nn.Module, folder: Path) -> None:
    """Load the weights of a checkpoint, or of a consolidated model, into ``model``.

    Raises CheckpointError if they do not fit.
    """
    found = read_weights(folder)
    if isinstance(model, Transformer):
        check_groups(model.config.moe, folder)
    check_fit(shapes_of(model.state_dict()), shapes_of(found), folder)
    model.load_state_dict(found)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights and buffers in a checkpoint of a model, or in a consolidated model."""
    if (folder / WEIGHTS_FILE).is_file():
        return read_weights_file(folder / WEIGHTS_FILE)
    state: dict[str, Any] = dict(load_checkpoint(folder, weights))
    return state.get("model") or {}


def check_loads(folder: Path, config: ModelConfig, kind: Kind = "model") -> None:
    """Raise CheckpointError unless a checkpoint is of ``kind`` and fits ``config``.

    It reads no weights.
    """
    check_kind(folder, kind)
    with torch.device("meta"):
        model = Transformer(config)
    found = {
        name.removeprefix(MODEL): shape
        for name, (shape, _) in tensor_shapes(folder).items()
        if weights(name)
    }
    check_fit(shapes_of(model.state_dict()), found, folder)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor, as compared by ``check_fit``."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_fit(
    wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], folder: Path
) -> None:
    """Raise CheckpointError naming the first weight that differs between model and checkpoint."""
    for name in [*wanted, *found]:
        here, there = wanted.get(name), found.get(name)
        if here == there:
            continue
        if here is None or there is None:
            lacking = "this model" if here is None else "the checkpoint"
            difference = f"{lacking} has no weight {name!r}"
        else:
            difference = f"{name} is {list(there)} in the checkpoint and {list(here)} in this model"
        advice = (
            " Their vocabularies differ: use the tokenizer of that run."
            if name.startswith(("embedding.", "head.")) and here and there and here[0] != there[0]
            else ""
        )
        raise CheckpointError(
            f"{folder} holds another model: {difference}.{advice} Set the model section to that "
            f"of the checkpoint's run (ultrathink config show RUN)."
        )


def check_groups(moe: MoeConfig | None, folder: Path) -> None:
    """Raise CheckpointError if a checkpoint's groups of experts differ in size from ``moe``'s.

    Their weights may still have the same shapes: two groups of 8 are not one group of 16.
    """
    known = model_config_of(folder)
    theirs = moe if known is None else known.moe
    if _group_sizes(theirs) != _group_sizes(moe):
        raise CheckpointError(
            f"{folder} holds another model: it has {_groups_text(theirs)}, but this one has "
            f"{_groups_text(moe)}. Set model.moe.groups to that of the checkpoint's run "
            f"(ultrathink config show RUN)."
        )


def model_config_of(folder: Path) -> ModelConfig | None:
    """The configuration of the model in a checkpoint or a consolidated model; None if unknown."""
    if (folder / WEIGHTS_FILE).is_file():
        has_config = (folder / "config.yaml").is_file()
        return RunFolder(folder).read_config().model if has_config else None
    known = (read_state(folder).get("config") or {}).get("model")
    return None if known is None else ModelConfig.model_validate(known)


def _group_sizes(moe: MoeConfig | None) -> list[tuple[int, int]]:
    return [(group.num_experts, group.num_slots) for group in moe.groups] if moe else []


def _groups_text(moe: MoeConfig | None) -> str:
    """The groups as text."""
    if moe is None:
        return "no experts"
    groups = [
        f"{group.name} {group.num_experts}"
        + (f" of {group.num_slots} slots" if group.num_slots > group.num_experts else "")
        for group in moe.groups
    ]
    return f"the expert groups {' + '.join(groups)}"


def weights_from(text: str, runs_dir: str) -> tuple[Path, RunFolder | None]:
    """The checkpoint of ``training.init_from`` (RUN, RUN@step or a folder), and its run.

    Warns if the last or best is damaged and an earlier one is used; raises CheckpointError if it
    is not a model.
    """
    path = Path(text)
    if (path / WEIGHTS_FILE).is_file():
        return path, RunFolder(path) if (path / "config.yaml").is_file() else None
    if (path / "state.json").is_file():
        check_kind(path, "model")
        parent = path.resolve().parent.parent
        is_run = (parent / "config.yaml").is_file()
        return path, RunFolder(parent) if is_run else None
    name, which = split_run(text)
    run = find_run(name, runs_dir)
    return _sound_model(run, which), run


def _sound_model(run: RunFolder, which: str | int) -> Path:
    """A checkpoint of a model with undamaged weights."""
    path, notes = run.sound_checkpoint(which, weights)
    for note in notes:
        warnings.warn(note, UserWarning, stacklevel=3)  # at the caller that loads the model
    check_kind(path, "model")
    return path
