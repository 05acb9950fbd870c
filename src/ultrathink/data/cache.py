"""Tokenized documents on disk, built once for each content and tokenizer, read by memory map.

A store is a folder:

- ``tokens.bin``: the documents' tokens, each document followed by the end-of-text token
- ``offsets.npy``: where each document starts, and the total at the end
- ``token_bytes.npy``: UTF-8 bytes that each id of the vocabulary stands for
- ``meta.json``: counts, types, and the sizes of the other files; written last
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ultrathink.core.files import sync_folder, write_atomic
from ultrathink.data.documents import Document, Progress, Source, Split
from ultrathink.data.tokenizers.base import Tokenizer

CACHE_VARIABLE = "ULTRATHINK_CACHE"
FORMAT = 1  # part of the key: a store of another format is another store
_TOKENS, _OFFSETS, _TOKEN_BYTES, _META = "tokens.bin", "offsets.npy", "token_bytes.npy", "meta.json"
_BATCH_CHARACTERS = 2_000_000
_ABANDONED_AFTER_S = 24 * 3600


class DamagedStoreError(Exception):
    """A store that is not there, or is not whole; it is built again."""


class TokenStore:
    """The tokens of one source's documents; opened at first use, so that it is cheap to pickle."""

    def __init__(self, folder: Path, name: str) -> None:
        """``name`` is the source's; DamagedStoreError where ``folder`` holds no whole store."""
        self.folder = folder
        self.name = name
        meta = _read_meta(folder)
        self.num_tokens: int = meta["num_tokens"]  # end-of-text tokens included
        self.num_documents: int = meta["num_documents"]
        self.num_bytes: int = meta["num_bytes"]  # UTF-8 bytes of the documents, nothing between
        self.eot_id: int = meta["eot_id"]
        self.dtype: str = meta["dtype"]

    @cached_property
    def tokens(self) -> npt.NDArray[Any]:
        """All tokens, ``uint16`` or ``uint32`` ``[num_tokens]``."""
        if self.num_tokens == 0:  # an empty file cannot be mapped
            return np.empty(0, dtype=self.dtype)
        mapped = np.memmap(self.folder / _TOKENS, dtype=self.dtype, mode="r")
        return mapped.view(np.ndarray)  # the same memory, without memmap's slow slicing

    @cached_property
    def offsets(self) -> npt.NDArray[np.int64]:
        """Where each document starts, then ``num_tokens``; ``[num_documents + 1]``."""
        return _mapped(self.folder / _OFFSETS)

    @cached_property
    def token_bytes(self) -> npt.NDArray[np.int64]:
        """UTF-8 bytes that each id stands for, 0 for the end-of-text token; ``[vocab_size]``."""
        return _mapped(self.folder / _TOKEN_BYTES).astype(np.int64)

    def __getstate__(self) -> dict[str, Any]:
        # Maps are opened again where the store arrives: pickling one would copy its content.
        opened = {"tokens", "offsets", "token_bytes"}
        return {key: value for key, value in self.__dict__.items() if key not in opened}


def _mapped(path: Path) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array.view(np.ndarray)


def cache_folder(cache_dir: str | None) -> Path:
    """``cache_dir``, else ``$ULTRATHINK_CACHE``, else ``~/.cache/ultrathink``."""
    named = cache_dir or os.environ.get(CACHE_VARIABLE)
    return Path(named).expanduser() if named else Path.home() / ".cache" / "ultrathink"


def open_or_build(
    source: Source,
    split: Split,
    tokenizer: Tokenizer,
    cache: Path,
    progress: Progress | None = None,
) -> TokenStore:
    """The store of ``source``'s documents, from the cache where it is there and whole.

    A store that was cut short is built again. Processes that build the same store at the same
    time do not meet: each writes its own, the first to finish is used by all.
    """
    parts = [FORMAT, source.fingerprint(split), split, tokenizer.fingerprint]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    folder = cache / "tokens" / key
    try:
        return TokenStore(folder, source.name)
    except DamagedStoreError:
        pass
    label = f"tokenizing {source.name} ({split})"
    build_store(
        folder, source.documents(split), tokenizer, label, source.num_bytes(split), progress
    )
    return TokenStore(folder, source.name)


def build_store(
    folder: Path,
    documents: Iterator[Document],
    tokenizer: Tokenizer,
    label: str = "tokenizing",
    total_bytes: int = 0,
    progress: Progress | None = None,
) -> None:
    """Tokenize ``documents`` into ``folder``: written beside it, then renamed into place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder.parent)
    beside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}.tmp")
    beside.mkdir()
    try:
        _write_store(beside, documents, tokenizer, label, total_bytes, progress)
        _put_in_place(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _write_store(
    folder: Path,
    documents: Iterator[Document],
    tokenizer: Tokenizer,
    label: str,
    total_bytes: int,
    progress: Progress | None,
) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    ends: list[int] = []
    num_tokens = num_bytes = 0
    with (folder / _TOKENS).open("wb") as file:
        for texts in _batches(documents):
            for ids in tokenizer.encode_batch(texts):
                block = np.empty(len(ids) + 1, dtype=dtype)
                block[:-1] = ids
                block[-1] = tokenizer.eot_id
                file.write(block.tobytes())
                num_tokens += len(block)
                ends.append(num_tokens)
            num_bytes += sum(len(text.encode()) for text in texts)
            if progress is not None:
                progress(label, num_bytes, max(total_bytes, num_bytes))
        _flush(file)
    lengths = [len(tokenizer.decode_bytes([token])) for token in range(tokenizer.vocab_size)]
    _save_array(folder / _OFFSETS, np.array([0, *ends], dtype=np.int64))
    _save_array(folder / _TOKEN_BYTES, np.array(lengths, dtype=np.uint32))
    meta = {
        "format": FORMAT,
        "num_tokens": num_tokens,
        "num_documents": len(ends),
        "num_bytes": num_bytes,
        "eot_id": tokenizer.eot_id,
        "dtype": dtype.name,
        "sizes": {
            name: (folder / name).stat().st_size for name in (_TOKENS, _OFFSETS, _TOKEN_BYTES)
        },
    }
    write_atomic(folder / _META, json.dumps(meta, indent=2) + "\n")
    sync_folder(folder)


def _batches(documents: Iterator[Document]) -> Iterator[list[str]]:
    """Texts in groups large enough to keep the tokenizer's threads busy."""
    texts: list[str] = []
    num_characters = 0
    for document in documents:
        texts.append(document.text)
        num_characters += len(document.text)
        if num_characters >= _BATCH_CHARACTERS:
            yield texts
            texts, num_characters = [], 0
    if texts:
        yield texts


def _save_array(path: Path, array: npt.NDArray[Any]) -> None:
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=False)
        _flush(file)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _put_in_place(beside: Path, folder: Path) -> None:
    try:
        beside.rename(folder)
    except OSError:
        if _is_whole(folder):
            return  # another process was first; the contents are equal
        # A damaged store is moved away first: a folder cannot be renamed onto a full one.
        discarded = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}.tmp")
        with suppress(FileNotFoundError):
            folder.rename(discarded)
        try:
            beside.rename(folder)
        except OSError:
            if not _is_whole(folder):
                raise
        shutil.rmtree(discarded, ignore_errors=True)
    sync_folder(folder.parent)


def _is_whole(folder: Path) -> bool:
    try:
        _read_meta(folder)
    except DamagedStoreError:
        return False
    return True


def _read_meta(folder: Path) -> dict[str, Any]:
    """The meta file of a whole store; DamagedStoreError says what is missing of any other."""
    try:
        meta: dict[str, Any] = json.loads((folder / _META).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in meta["sizes"]}
        itemsize = np.dtype(meta["dtype"]).itemsize
        whole = sizes == meta["sizes"] and sizes[_TOKENS] == meta["num_tokens"] * itemsize
        counts = [meta[key] for key in ("num_documents", "num_bytes", "eot_id")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedStoreError(f"{folder}: {error}") from error
    if not whole or not all(isinstance(count, int) for count in counts):
        raise DamagedStoreError(f"{folder}: its files are not as long as {_META} says")
    return meta


def _remove_abandoned(parent: Path) -> None:
    """Delete what builds that were killed left behind, once it is a day old."""
    for folder in parent.glob(".*.tmp"):
        with suppress(OSError):
            # A build that is under way keeps writing to its files.
            touched = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
            if time.time() - touched > _ABANDONED_AFTER_S:
                shutil.rmtree(folder, ignore_errors=True)
