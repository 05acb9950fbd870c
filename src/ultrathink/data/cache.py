"""Tokenized documents on disk: built once for each text and tokenizer, read by memory map.

A store is a folder:

- ``tokens.bin``: the documents' tokens, each document followed by the end-of-text token
- ``offsets.npy``: where each document starts, and the total at the end
- ``token_bytes.npy``: UTF-8 bytes that each id of the vocabulary stands for
- ``meta.json``: counts, types, and the manifest of the other files; written last
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ultrathink.core.errors import CheckpointError, DataError
from ultrathink.core.files import clean_up, sync_file, sync_folder, write_atomic
from ultrathink.data.checksums import file_checksum, sealed, unsealed
from ultrathink.data.documents import Document, Progress, Split, Verify
from ultrathink.data.manifest import FileEntry, Manifest, Stat, wait_for_tick
from ultrathink.data.sources.base import Source
from ultrathink.data.tokenizers.base import Tokenizer, behavior_hash

CACHE_VARIABLE = "ULTRATHINK_CACHE"
FORMAT = 3  # part of the key: a store of another format is another store
_TOKENS, _OFFSETS, _TOKEN_BYTES, _META = "tokens.bin", "offsets.npy", "token_bytes.npy", "meta.json"
_BATCH_CHARACTERS = 2_000_000
_ABANDONED_AFTER_S = 24 * 3600


class DamagedStoreError(Exception):
    """A store that is missing or not as it was written; the message says what is wrong."""


class TokenStore:
    """The tokens of one source's documents; opened at first use, so that it is cheap to pickle."""

    def __init__(self, folder: Path, name: str, verify: Verify = "stat") -> None:
        """``name`` is the source's; DamagedStoreError where ``folder`` holds no whole store.

        Files whose stat is not the recorded one are hashed; with ``full`` all are.
        """
        self.folder = folder
        self.name = name
        meta = _read_meta(folder, verify)
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
        with self._reading():
            mapped = np.memmap(self.folder / _TOKENS, dtype=self.dtype, mode="r")
        return mapped.view(np.ndarray)  # the same memory, without memmap's slow slicing

    @cached_property
    def offsets(self) -> npt.NDArray[np.int64]:
        """Where each document starts, then ``num_tokens``; ``[num_documents + 1]``."""
        return self._mapped(_OFFSETS)

    @cached_property
    def token_bytes(self) -> npt.NDArray[np.int64]:
        """UTF-8 bytes that each id stands for, 0 for the end-of-text token; ``[vocab_size]``."""
        return self._mapped(_TOKEN_BYTES).astype(np.int64)

    def __getstate__(self) -> dict[str, Any]:
        # The receiving process opens its own maps: pickling one would copy its content.
        opened = {"tokens", "offsets", "token_bytes"}
        return {key: value for key, value in self.__dict__.items() if key not in opened}

    def _mapped(self, name: str) -> npt.NDArray[Any]:
        with self._reading():
            array: npt.NDArray[Any] = np.load(self.folder / name, mmap_mode="r", allow_pickle=False)
        return array.view(np.ndarray)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            raise DataError(
                f"the token cache of {self.name} was complete when it was opened and cannot be "
                f"read now ({error}). Resume the run, which rebuilds the cache."
            ) from error


@contextmanager
def without_read_ahead(arrays: Iterable[npt.NDArray[Any]]) -> Iterator[None]:
    """Switch off read-ahead of mapped ``arrays`` while only a few places are read."""
    maps = [base for array in arrays if isinstance(base := _memory_of(array), mmap.mmap)]
    if not hasattr(mmap, "MADV_RANDOM"):
        maps = []
    for each in maps:
        each.madvise(mmap.MADV_RANDOM)
    try:
        yield
    finally:
        for each in maps:
            each.madvise(mmap.MADV_NORMAL)


def _memory_of(array: Any) -> Any:
    while isinstance(array, np.ndarray):
        array = array.base
    return array


def cache_folder(cache_dir: str | None) -> Path:
    """``cache_dir``, else ``$ULTRATHINK_CACHE``, else ``~/.cache/ultrathink``."""
    named = cache_dir or os.environ.get(CACHE_VARIABLE)
    return Path(named).expanduser() if named else Path.home() / ".cache" / "ultrathink"


def store_key(fingerprint: str, split: Split, tokenizer: Tokenizer) -> str:
    """What the store of a split with this fingerprint is called."""
    behavior = behavior_hash(tokenizer)  # other code may make other tokens of the same text
    parts = [FORMAT, fingerprint, split, tokenizer.fingerprint, behavior]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def cached_store(cache: Path, key: str) -> Path:
    """The folder of the store that is called ``key``, which may not exist."""
    return cache / "tokens" / key


def open_or_build(
    source: Source,
    split: Split,
    tokenizer: Tokenizer,
    cache: Path,
    progress: Progress | None = None,
    notes: list[str] | None = None,
    verify: Verify = "stat",
) -> TokenStore:
    """The store of ``source``'s documents, from the cache or built.

    A damaged store is rebuilt and ``notes`` says so. Processes that build the same store at the
    same time write one each; all use the one that is finished first.
    """
    folder = cached_store(cache, store_key(source.fingerprint(split), split, tokenizer))
    damage = None
    if folder.exists():
        try:
            return TokenStore(folder, source.name, verify)
        except DamagedStoreError as error:
            damage = str(error)
    label = f"tokenizing {source.name} ({split})"
    documents, num_bytes = source.documents(split), source.expected_bytes(split)
    with writing_to(cache):
        build_store(folder, documents, tokenizer, label, num_bytes, progress)
    if damage is not None and notes is not None:
        notes.append(
            f"the token cache of {source.name} ({split}) was damaged ({damage}) and was rebuilt"
        )
    return TokenStore(folder, source.name)


@contextmanager
def writing_to(cache: Path) -> Iterator[None]:
    """Turn a failure to write (a full disk, a read-only folder) into a DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"the cache {cache} cannot be written ({error}). Make room, or name another folder "
            f"with data.cache_dir or ${CACHE_VARIABLE}."
        ) from error


def build_store(
    folder: Path,
    documents: Iterator[Document],
    tokenizer: Tokenizer,
    label: str = "tokenizing",
    total_bytes: int = 0,
    progress: Progress | None = None,
) -> None:
    """Tokenize ``documents`` into ``folder``: write a temporary folder, then rename it."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    ends: list[int] = []
    num_tokens = num_bytes = 0
    with cached_folder(folder, _read_meta) as beside:
        with (beside / _TOKENS).open("wb") as file:
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
        np.save(beside / _OFFSETS, np.array([0, *ends], dtype=np.int64))
        lengths = [len(tokenizer.decode_bytes([token])) for token in range(tokenizer.vocab_size)]
        np.save(beside / _TOKEN_BYTES, np.array(lengths, dtype=np.uint32))
        manifest: Manifest = {}
        for name in (_TOKENS, _OFFSETS, _TOKEN_BYTES):
            sync_file(beside / name)
            manifest[name] = FileEntry(Stat.of(beside / name), file_checksum(beside / name))
        wait_for_tick(beside, [entry.stat for entry in manifest.values()])
        meta = {
            "format": FORMAT,
            "num_tokens": num_tokens,
            "num_documents": len(ends),
            "num_bytes": num_bytes,
            "eot_id": tokenizer.eot_id,
            "dtype": dtype.name,
        }
        _write_meta(beside, meta, manifest)
        sync_folder(beside)


@contextmanager
def cached_folder(folder: Path, read: Callable[[Path], object]) -> Iterator[Path]:
    """A temporary folder to fill, which then is ``folder``.

    One that is already there stays where ``read`` can read it: another process was first, with the
    same content.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder.parent)
    beside, damaged = (
        folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}.tmp") for _ in range(2)
    )
    beside.mkdir()
    try:
        yield beside
        for is_last in (False, True):
            try:
                beside.rename(folder)
                break
            except OSError:
                with suppress(DamagedStoreError, CheckpointError):
                    read(folder)
                    break
                if is_last:
                    raise
                # Moved away first: a folder cannot be renamed onto a full one.
                with suppress(FileNotFoundError):
                    folder.rename(damaged)
        sync_folder(folder.parent)
    finally:
        clean_up(beside)
        clean_up(damaged)


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


def _write_meta(folder: Path, meta: dict[str, Any], manifest: Manifest) -> None:
    files = {name: entry.to_json() for name, entry in manifest.items()}
    write_atomic(folder / _META, json.dumps(sealed({**meta, "files": files}), indent=2) + "\n")


def _read_meta(folder: Path, verify: Verify = "stat") -> dict[str, Any]:
    """The meta file of a complete store; DamagedStoreError where it is not."""
    try:
        meta = unsealed(json.loads((folder / _META).read_text(encoding="utf-8")))
        if meta is None:
            raise DamagedStoreError(f"{_META}: other content than was written")
        if meta["format"] != FORMAT:
            raise DamagedStoreError(f"format {meta['format']}, this version reads {FORMAT}")
        known = {name: FileEntry.from_json(entry) for name, entry in meta.pop("files").items()}
        found = {name: _verified(folder / name, entry, verify) for name, entry in known.items()}
    except FileNotFoundError as error:
        raise DamagedStoreError(f"{Path(error.filename).name} is missing") from error
    except OSError as error:
        raise DamagedStoreError(f"cannot be read: {error}") from error
    except ValueError as error:
        raise DamagedStoreError(f"{_META}: not JSON ({error})") from error
    if found != known:  # equal content with another stat, as of a copy: not to be hashed again
        with suppress(OSError):
            _write_meta(folder, meta, found)
    return meta


def _verified(path: Path, known: FileEntry, verify: Verify) -> FileEntry:
    """The entry of a store's file now; DamagedStoreError where its content is not ``known``'s."""
    stat = Stat.of(path)
    lasting = stat.settled()
    if stat.size_bytes != known.stat.size_bytes:
        raise DamagedStoreError(
            f"{path.name}: {stat.size_bytes:,} bytes instead of {known.stat.size_bytes:,}"
        )
    if verify == "stat" and stat == known.stat:
        return known
    if file_checksum(path) != known.sha256:
        raise DamagedStoreError(f"{path.name}: other content than was written")
    return known if stat == known.stat else replace(known, stat=lasting)


def _remove_abandoned(parent: Path) -> None:
    """Delete the temporary folders of killed builds once they are a day old."""
    for folder in parent.glob(".*.tmp"):
        with suppress(OSError):
            # A running build keeps writing to its files.
            touched = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
            if time.time() - touched > _ABANDONED_AFTER_S:
                clean_up(folder)
