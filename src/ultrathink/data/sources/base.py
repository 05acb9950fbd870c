"""What all sources share: one scan that hashes the documents, and the split it decides."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from ultrathink.data.documents import Document, Split


@dataclass(frozen=True, slots=True)
class Entry:
    """What the scan remembers of a document."""

    id: str
    digest: bytes  # SHA-256 of the text
    num_bytes: int


class ScannedSource(ABC):
    """A source that reads all of its documents once to hash them, then again as they are used.

    A subclass says what the documents are (``_read``) and which are held out (``_held_out``).
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.num_skipped = 0
        self._entries: list[Entry] | None = None
        self._held_out_flags: list[bool] = []

    @abstractmethod
    def _read(self) -> Iterator[Document | None]:
        """Every document in a fixed order, None in place of one that was skipped."""

    @abstractmethod
    def _held_out(self, entries: list[Entry]) -> list[bool]:
        """For each document, whether it belongs to the validation split."""

    def documents(self, split: Split) -> Iterator[Document]:
        """The documents of ``split``, in a fixed order."""
        self._scan()
        readable = (document for document in self._read() if document is not None)
        if split == "all":
            yield from readable
            return
        # Not strict: a file that grew since the scan is caught by the next run's fingerprint.
        for document, held_out in zip(readable, self._held_out_flags, strict=False):
            if held_out == (split == "val"):
                yield document

    def fingerprint(self, split: Split) -> str:
        """A hash of the ids and contents of ``split``."""
        digest = hashlib.sha256()
        for entry in self._select(split):
            digest.update(f"{len(entry.id.encode())}:{entry.id}".encode() + entry.digest)
        return digest.hexdigest()

    def num_bytes(self, split: Split) -> int:
        """UTF-8 bytes of all documents of ``split``."""
        return sum(entry.num_bytes for entry in self._select(split))

    def _select(self, split: Split) -> list[Entry]:
        entries = self._scan()
        if split == "all":
            return entries
        wanted = split == "val"
        flags = self._held_out_flags
        return [entry for entry, flag in zip(entries, flags, strict=True) if flag == wanted]

    def _scan(self) -> list[Entry]:
        if self._entries is None:
            entries: list[Entry] = []
            num_skipped = 0
            for document in self._read():
                if document is None:
                    num_skipped += 1
                    continue
                payload = document.text.encode()
                digest = hashlib.sha256(payload).digest()
                entries.append(Entry(document.id, digest, len(payload)))
            self.num_skipped = num_skipped
            self._held_out_flags = self._held_out(entries)
            self._entries = entries
        return self._entries
