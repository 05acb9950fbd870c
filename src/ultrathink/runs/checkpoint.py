"""Checkpoints: tensors as safetensors through torch's distributed checkpoint, the rest as JSON.

A checkpoint is a folder: ``*.safetensors`` with an index, and ``state.json``. Nothing is pickled.
It is written beside its final name and renamed, so a crash never leaves half of one.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ultrathink.core.errors import CheckpointError
from ultrathink.core.files import sync_folder, write_atomic
from ultrathink.core.protocols import State

STATE_FILE = "state.json"
FORMAT = 1
_TENSOR = "__tensor__"  # in state.json, stands where a tensor was, with the tensor's name


def save_checkpoint(folder: Path, state: State) -> None:
    """Write nested ``state`` (plain values and tensors) to ``folder``, whole or not at all."""
    tensors: dict[str, Tensor] = {}
    plain = _take_tensors(state, "", tensors)
    beside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        _write_tensors(beside, tensors)
        text = json.dumps({"format": FORMAT, "state": plain}, allow_nan=True)
        write_atomic(beside / STATE_FILE, text)
        for file in beside.iterdir():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(beside)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(beside, folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def load_checkpoint(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> State:
    """Read a checkpoint back as it was saved, on the CPU.

    ``wanted`` chooses tensors by their slash-separated name ("model/layers.0…"); in place of the
    others stands None.
    """
    plain = read_state(folder)
    tensors = _read_tensors(folder, wanted)
    missing = [name for name in _named_tensors(plain) if wanted(name) and name not in tensors]
    if missing:
        raise CheckpointError(
            f"the tensors in {folder} cannot be read ({missing[0]} is missing); the checkpoint is "
            f"damaged or incomplete. Use an earlier one: --resume RUN@STEP."
        )
    state: State = _put_tensors(plain, tensors)
    return state


def read_state(folder: Path) -> dict[str, Any]:
    """The part of a checkpoint that is not tensors, where each tensor is named only."""
    path = folder / STATE_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} is not a checkpoint: it has no {STATE_FILE}; "
            f"name a folder like runs/demo/checkpoints/step_00000100."
        ) from None
    except ValueError as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); use an earlier checkpoint: --resume RUN@STEP."
        ) from None
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {content.get('format')!r}, this version reads {FORMAT}; "
            f"use the version of ultrathink that wrote it."
        )
    state: dict[str, Any] = content["state"]
    return state


def tensor_shapes(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The shape and type of every tensor in a checkpoint, without reading them."""
    metadata = _reader(folder).read_metadata()
    return {
        name: (tuple(entry.size), entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
    }


def _take_tensors(node: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """A copy of ``node`` with each tensor moved to ``tensors`` and named in its place."""
    if isinstance(node, Tensor):
        tensors[path] = node.detach()
        return {_TENSOR: path}
    if isinstance(node, Mapping):
        return {
            str(key): _take_tensors(value, f"{path}/{key}" if path else str(key), tensors)
            for key, value in node.items()
        }
    if isinstance(node, list | tuple):
        return [_take_tensors(value, f"{path}/{i}", tensors) for i, value in enumerate(node)]
    if node is None or isinstance(node, str | int | float | bool):
        return node
    raise TypeError(f"a checkpoint cannot hold {type(node).__name__} (at {path})")


def _put_tensors(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    """``node`` with each named tensor in its place, None where it was not wanted."""
    if isinstance(node, dict):
        if _TENSOR in node:
            return tensors.get(node[_TENSOR])
        return {key: _put_tensors(value, tensors) for key, value in node.items()}
    if isinstance(node, list):
        return [_put_tensors(value, tensors) for value in node]
    return node


def _named_tensors(node: Any) -> list[str]:
    """The names of all tensors that belong into ``node``."""
    if isinstance(node, dict):
        if _TENSOR in node:
            return [str(node[_TENSOR])]
        return [name for value in node.values() for name in _named_tensors(value)]
    if isinstance(node, list):
        return [name for value in node for name in _named_tensors(value)]
    return []


def _write_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    with _single_process_is_meant():
        dcp.save(
            dict(tensors), storage_writer=HuggingFaceStorageWriter(path=str(folder)), no_dist=True
        )


def _read_tensors(folder: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    import torch.distributed.checkpoint as dcp

    try:
        tensors = {
            name: torch.empty(shape, dtype=dtype)
            for name, (shape, dtype) in tensor_shapes(folder).items()
            if wanted(name)
        }
        with _single_process_is_meant():
            dcp.load(tensors, storage_reader=_reader(folder), no_dist=True)
    except Exception as error:  # the storage reader raises whatever its parser met
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise CheckpointError(
            f"the tensors in {folder} cannot be read ({reason}); the checkpoint is damaged or "
            f"incomplete. Use an earlier one: --resume RUN@STEP."
        ) from error
    return tensors


def _reader(folder: Path) -> Any:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    return HuggingFaceStorageReader(path=str(folder))


class _single_process_is_meant(warnings.catch_warnings):  # noqa: N801 — reads as a statement
    """Silences torch's reminder that no process group is there; one process is what we mean."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")
