"""A source of documents: one scan that hashes its files, and the split into train and val."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ultrathink.core.errors import DataError
from ultrathink.data.checksums import HashedFile, file_checksum
from ultrathink.data.documents import (
    HELD_OUT_ONE_IN,
    Document,
    FileSummary,
    Split,
    Verify,
    file_label,
)
from ultrathink.data.manifest import FileEntry, Manifest, Stat, read_manifest, write_manifest

_NOWHERE = Stat(0, 0, 0, 0)


class Source(ABC):
    """Documents in files, hashed once, then known by their manifest; some are held out.

    Iterating twice gives the same documents in the same order, or DataError where a file changed
    in between. A text never holds lone surrogates: all of it can be written as UTF-8. A subclass
    says which documents a file has (``_read``) and which are held out.
    """

    def __init__(
        self, name: str, files: Mapping[str, Path | None], reading: Mapping[str, Any]
    ) -> None:
        """``files`` by id, in order, None where text is generated.

        ``reading`` is all that decides what is found in them: the key of their manifest.
        """
        self.name = name
        self._paths = files
        self._reading = reading
        self._entries: Manifest | None = None

    @abstractmethod
    def _read(self, file_id: str, file: HashedFile) -> Iterator[Document | None]:
        """The documents of a file in order, None in place of one that was skipped."""

    @abstractmethod
    def _is_held_out(self, document: Document, key: int) -> bool:
        """Whether a document, whose text has the hash ``key``, is for validation."""

    @property
    def num_skipped(self) -> int:
        """Unreadable documents that were left out."""
        return sum(summary.num_skipped for summary in self._summaries().values())

    def scan(self, manifests: Path | None = None, verify: Verify = "stat") -> None:
        """Find out what each file holds; reads those that the manifest does not know.

        Manifests are kept in the folder ``manifests``; ``verify: full`` hashes every file. A source
        is scanned at its first use at the latest. DataError where text cannot be read.
        """
        parts = json.dumps(dict(self._reading), sort_keys=True)
        path = (manifests or Path()) / f"{hashlib.sha256(parts.encode()).hexdigest()[:32]}.json"
        known = {} if manifests is None else read_manifest(path)
        self._entries = {file: self._entry(file, known.get(file), verify) for file in self._paths}
        if manifests is not None and self._entries != known:
            write_manifest(path, self._entries)

    def documents(self, split: Split) -> Iterator[Document]:
        """The documents of ``split``, in a fixed order; DataError where a file changed since."""
        for file, known in self._summaries().items():
            tally, only_grew = _Tally(file), False
            for document in self._read(file, self._open(file)):
                key = tally.add(document)
                only_grew = only_grew or tally.equals(known)
                if document is None:
                    continue
                if split == "all" or self._is_held_out(document, key) == (split == "val"):
                    yield document
            if tally.summary() != known:
                event = "grew" if only_grew else "changed"
                label = file_label(self.name, file, is_only=len(self.files()) == 1)
                raise DataError(
                    f"{label} {event} while it was read; retry once nothing writes to it."
                )

    def files(self) -> dict[str, FileSummary]:
        """What each file holds, by its id, in order; those without documents are left out."""
        return {file: found for file, found in self._summaries().items() if found.num_documents}

    def begins_with(self, file: str, known: FileSummary) -> bool:
        """Whether ``file`` begins with the documents of ``known``."""
        tally = _Tally(file)
        for document in self._read(file, self._open(file)):
            tally.add(document)
            if tally.num_documents >= known.num_documents:
                break
        return tally.equals(known)

    def fingerprint(self, split: Split) -> str:
        """A hash that decides the documents of ``split``: of all documents and the split's rule."""
        digest = hashlib.sha256()
        for file, found in self.files().items():
            digest.update(_framed(file) + bytes.fromhex(found.digest))
        if split == "all":
            return digest.hexdigest()
        return hashlib.sha256(f"{split} {self._rule()} {digest.hexdigest()}".encode()).hexdigest()

    def expected_bytes(self, split: Split) -> int:
        """About how many UTF-8 bytes ``split`` has, from the share that is held out."""
        share = {"all": 1.0, "val": self._held_out_share(), "train": 1 - self._held_out_share()}
        total = sum(found.num_bytes for found in self._summaries().values())
        return round(total * share[split])

    def _held_out_share(self) -> float:
        return 1 / HELD_OUT_ONE_IN

    def _rule(self) -> str:
        """What decides which documents are held out, besides the documents."""
        return "by id"

    def _summaries(self) -> dict[str, FileSummary]:
        if self._entries is None:
            self.scan()
        entries = self._entries or {}
        return {file: entry.documents for file, entry in entries.items() if entry.documents}

    def _open(self, file: str) -> HashedFile:
        return HashedFile(self._paths[file] or Path())

    def _entry(self, file: str, known: FileEntry | None, verify: Verify) -> FileEntry:
        """What a file holds: as ``known`` where it is the same, else from reading it."""
        path, lasting = self._paths[file], _NOWHERE
        if path is not None:
            with suppress(OSError):  # reading it says what is wrong
                # Before it is read: a change from now on gives it another one.
                stat = Stat.of(path)
                lasting = stat.settled()
                if known is not None and stat.size_bytes == known.stat.size_bytes:
                    if verify == "stat" and stat == known.stat:
                        return known
                    if file_checksum(path) == known.sha256:
                        return replace(known, stat=lasting)
        tally, opened = _Tally(file), self._open(file)
        for document in self._read(file, opened):
            tally.add(document)
        return FileEntry(lasting, opened.hexdigest(), tally.summary())


class _Tally:
    """Counts and hashes the documents of a file."""

    def __init__(self, file: str) -> None:
        self.num_documents = 0
        self._file = file
        self._digest = hashlib.sha256()
        self._num_bytes = self._num_skipped = 0
        self._lowest, self._highest = 2**64 - 1, 0

    def add(self, document: Document | None) -> int:
        """Count a document, or a skipped one (None); returns the hash of its text."""
        if document is None:
            self._num_skipped += 1
            return 0
        payload = document.text.encode()
        text_digest = hashlib.sha256(payload).digest()
        key = int.from_bytes(text_digest[:8], "big")
        self._digest.update(_framed(document.id.removeprefix(self._file)) + text_digest)
        self.num_documents += 1
        self._num_bytes += len(payload)
        self._lowest, self._highest = min(self._lowest, key), max(self._highest, key)
        return key

    def equals(self, known: FileSummary) -> bool:
        """Whether the documents counted so far are those of ``known``."""
        if self.num_documents != known.num_documents:
            return False
        return self._digest.hexdigest() == known.digest

    def summary(self) -> FileSummary:
        return FileSummary(
            self.num_documents,
            self._num_bytes,
            self._digest.hexdigest(),
            self._num_skipped,
            self._lowest,
            self._highest,
        )


def _framed(text: str) -> bytes:
    """``text`` after its length, so that joined texts can only be split in one way."""
    payload = text.encode()
    return f"{len(payload)}:".encode() + payload
