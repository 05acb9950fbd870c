"""The tensors of a checkpoint: safetensors through torch's distributed checkpoint.

These are the steps of ``dcp.save`` and ``dcp.load`` for one process, taken one by one: those
functions warn that no process group is there, and a thread cannot silence a warning without
silencing those of others meanwhile.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)

Shapes: TypeAlias = dict[str, tuple[tuple[int, ...], torch.dtype]]

_PIECE_BYTES = 1 << 22


def write_tensors(
    folder: Path,
    tensors: Mapping[str, Tensor],
    file_numbers: Mapping[str, int],
    check: Callable[[], None],
) -> None:
    """Write each tensor to the file of its number (from 1 on), and an index of them.

    ``check`` is called every few megabytes.
    """
    writer = HuggingFaceStorageWriter(path=str(folder), fqn_to_index_mapping=dict(file_numbers))
    writer.per_thread_copy_ahead = 0  # else it waits for the work of the default CUDA stream
    writer.fs = _CheckedFiles(check)
    planner = DefaultSavePlanner()
    planner.set_up_planner(dict(tensors), writer.storage_meta(), is_coordinator=True)
    writer.set_up_storage_writer(is_coordinator=True)
    local_plan = writer.prepare_local_plan(planner.create_local_plan())
    plans, metadata = planner.create_global_plan([local_plan])
    [plan] = writer.prepare_global_plan(plans)
    writes = writer.write_data(planner.finish_plan(plan), planner)
    writes.wait()
    writer.finish(metadata, [writes.value()])


def read_tensors(
    folder: Path, files: Collection[str], wanted: Callable[[str], bool]
) -> dict[str, Tensor]:
    """The ``wanted`` tensors that are in ``files`` of ``folder``."""
    reader = _reader(folder, files)
    metadata = reader.read_metadata()
    tensors = {
        name: torch.empty(shape, dtype=dtype)
        for name, (shape, dtype) in _shapes(metadata).items()
        if wanted(name)
    }
    planner = DefaultLoadPlanner()
    planner.set_up_planner(dict(tensors), metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    local_plan = reader.prepare_local_plan(planner.create_local_plan())
    [plan] = reader.prepare_global_plan(planner.create_global_plan([local_plan]))
    reader.read_data(planner.finish_plan(plan), planner).wait()
    return tensors


def read_shapes(folder: Path, files: Collection[str]) -> Shapes:
    """Shape and type of every tensor in ``files`` of ``folder``, from their heads only."""
    return _shapes(_reader(folder, files).read_metadata())


def _reader(folder: Path, files: Collection[str]) -> HuggingFaceStorageReader:
    reader = HuggingFaceStorageReader(path=str(folder))
    reader.fs = _NamedFiles(files)
    return reader


def _shapes(metadata: Metadata) -> Shapes:
    return {
        name: (tuple(entry.size), entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)  # the only kind that is written here
    }


class _NamedFiles(FileSystem):
    """Lists the named files only, so that damage to others does not matter."""

    def __init__(self, names: Collection[str]) -> None:
        self.names = sorted(names)

    def ls(self, path: str | PathLike[str]) -> list[str]:
        return [str(Path(path) / name) for name in self.names]


class _CheckedFiles(FileSystem):
    """Writes files piece by piece, with a check before each."""

    def __init__(self, check: Callable[[], None]) -> None:
        self.check = check

    @contextmanager
    def create_stream(self, path: str | PathLike[str], mode: str) -> Iterator[io.IOBase]:
        self.check()
        if mode == "wb":
            with _CheckedFile(path, self.check) as stream:
                yield stream
        else:
            with super().create_stream(path, mode) as stream:
                yield stream


class _CheckedFile(io.FileIO):
    def __init__(self, path: str | PathLike[str], check: Callable[[], None]) -> None:
        super().__init__(path, "wb")
        self.check = check

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        while left:
            self.check()
            left = left[super().write(left[:_PIECE_BYTES]) :]
        return memoryview(data).nbytes
