"""The tensors of a checkpoint: safetensors through torch's distributed checkpoint.

These are the steps of ``dcp.save`` and ``dcp.load``, called one by one. Without a process group
those two functions warn, and a thread cannot silence a warning without silencing those of other
threads; with one they exchange plans, and the training thread would have to wait for that.
Here each process writes its own shards, and the header of each file records their offsets.
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
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from ultrathink.core.shards import Region, TensorShard

Shapes: TypeAlias = dict[str, tuple[tuple[int, ...], torch.dtype]]

_BLOCK_BYTES = 1 << 22


def write_tensors(
    folder: Path,
    tensors: Mapping[str, Tensor | TensorShard],
    file_numbers: Mapping[str, int],
    check: Callable[[], None],
    process: int | None = None,
) -> dict[str, list[str]]:
    """Write each tensor, or this process's shard of it, to the file of its number (from 1).

    ``process`` counts from 1, and is None for a run of one process. Each process has its own
    files; a tensor that is not divided is written by the first. Returns the tensor names in each
    file. ``check`` is called every few megabytes.
    """
    shards = {name: _as_shard(value, process) for name, value in tensors.items()}
    local = {name: shard.local for name, shard in shards.items() if shard.local is not None}
    writer = HuggingFaceStorageWriter(path=str(folder), fqn_to_index_mapping=dict(file_numbers))
    writer.per_thread_copy_ahead = 0  # above 0 it would wait for the default CUDA stream
    writer.fs = _CheckedFiles(check)
    writer.set_up_storage_writer(is_coordinator=True)
    plan = SavePlan(
        [_write_item(name, shards[name], tensor) for name, tensor in local.items()],
        storage_data={"fqn_to_index_mapping": dict(file_numbers), "shard_index": process},
    )
    writes = writer.write_data(plan, _Resolver(local))
    writes.wait()
    files: dict[str, list[str]] = {}
    for result in writes.value():
        files.setdefault(result.storage_data.relative_path, []).append(result.index.fqn)
    return files


def _as_shard(value: Tensor | TensorShard, process: int | None) -> TensorShard:
    if isinstance(value, TensorShard):
        return value
    local = value if process in (None, 1) else None
    return TensorShard(local, (0,) * value.ndim, tuple(value.shape), value.dtype)


def _write_item(name: str, shard: TensorShard, local: Tensor) -> WriteItem:
    offset = torch.Size(shard.offset)
    return WriteItem(
        index=MetadataIndex(name, offset),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offset, sizes=local.shape),
            properties=TensorProperties.create_from_tensor(local),
            size=torch.Size(shard.shape),
        ),
    )


class _Resolver(DefaultSavePlanner):
    """Hands the writer the tensor of each item."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.tensors[write_item.index.fqn]


def read_tensors(
    folder: Path,
    files: Collection[str],
    wanted: Callable[[str], bool],
    region: Region | None = None,
) -> dict[str, Tensor | TensorShard]:
    """The ``wanted`` tensors in ``files`` of ``folder``.

    Where ``region(name, shape)`` gives an offset and a size, only that part is read.
    """
    reader = _reader(folder, files)
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    found: dict[str, Tensor | TensorShard] = {}
    targets: dict[str, Tensor] = {}
    items: list[ReadItem] = []
    for name, (shape, dtype) in _shapes(metadata).items():
        if not wanted(name):
            continue
        part = region(name, shape) if region is not None else None
        offset, size = part or ((0,) * len(shape), shape)
        targets[name] = torch.empty(size, dtype=dtype)
        found[name] = (
            targets[name] if part is None else TensorShard(targets[name], offset, shape, dtype)
        )
        chunk = ChunkStorageMetadata(offsets=torch.Size(offset), sizes=torch.Size(size))
        if 0 not in size:
            entry = metadata.state_dict_metadata[name]
            assert isinstance(entry, TensorStorageMetadata), "it has a shape"
            items += create_read_items_for_chunk_list(name, entry, [chunk])
    reader.read_data(LoadPlan(items), _Filler(targets)).wait()
    return found


class _Filler(DefaultLoadPlanner):
    """Gives the reader the target of each item."""

    def __init__(self, targets: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.targets = targets

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        target = self.targets[read_item.dest_index.fqn]
        for axis, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            target = target.narrow(axis, start, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing to do: the tensor is a view of its target."""


def read_shapes(folder: Path, files: Collection[str]) -> Shapes:
    """Shape and type of every tensor in ``files`` of ``folder``, from the file headers only."""
    return _shapes(_reader(folder, files).read_metadata())


def _reader(folder: Path, files: Collection[str]) -> HuggingFaceStorageReader:
    reader = HuggingFaceStorageReader(path=str(folder))
    reader.fs = _NamedFiles(files)
    return reader


def _shapes(metadata: Metadata) -> Shapes:
    return {
        name: (tuple(entry.size), entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)  # the only kind written here
    }


class _NamedFiles(FileSystem):
    """Lists only the named files, so that damage to the others does not matter."""

    def __init__(self, names: Collection[str]) -> None:
        self.names = sorted(names)

    def ls(self, path: str | PathLike[str]) -> list[str]:
        return [str(Path(path) / name) for name in self.names]


class _CheckedFiles(FileSystem):
    """Writes files in blocks of a few megabytes, with a check before each."""

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
            left = left[super().write(left[:_BLOCK_BYTES]) :]
        return memoryview(data).nbytes
