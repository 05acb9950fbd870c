"""What all sources share: one scan that hashes the documents, and the split it decides."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, zip_longest

from ultrathink.core.errors import DataError
from ultrathink.data.documents import Document, FileSummary, Split, file_label

_DIGEST_DIGITS = 16


@dataclass(frozen=True, slots=True)
class Entry:
    """What the scan remembers of a document."""

    id: str
    digest: bytes  # SHA-256 of the text
    num_bytes: int

    @classmethod
    def of(cls, document: Document) -> Entry:
        payload = document.text.encode()
        return cls(document.id, hashlib.sha256(payload).digest(), len(payload))


class ScannedSource(ABC):
    """A source that reads all of its documents once to hash them, then again as they are used.

    A subclass says what the documents are (``_read``) and which are held out (``_held_out``).
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.num_skipped = 0
        self._entries: list[Entry] | None = None
        self._held_out_flags: list[bool] = []
        self._fingerprints: dict[Split, str] = {}

    @abstractmethod
    def _read(self) -> Iterator[Document | None]:
        """Every document in a fixed order, None in place of one that was skipped."""

    @abstractmethod
    def _held_out(self, entries: list[Entry]) -> list[bool]:
        """For each document, whether it belongs to the validation split."""

    def file_of(self, document_id: str) -> str:
        """The id of the file that a document is in; its own where each has a file to itself."""
        return document_id

    def documents(self, split: Split) -> Iterator[Document]:
        """The documents of ``split``, in a fixed order, each as it was when first read."""
        self._scan()
        for document, held_out in zip(self._read_again(), self._held_out_flags, strict=True):
            if split == "all" or held_out == (split == "val"):
                yield document

    def files(self, earlier: Mapping[str, int]) -> dict[str, FileSummary]:
        """What each file holds, by its id, in order; those without documents are left out."""
        found = {}
        for file, entries in groupby(self._scan(), key=lambda entry: self.file_of(entry.id)):
            digest = hashlib.sha256()
            num_documents = num_bytes = 0
            prefix = None
            for entry in entries:
                digest.update(_framed(entry.id.removeprefix(file)) + entry.digest)
                num_documents += 1
                num_bytes += entry.num_bytes
                if num_documents == earlier.get(file):
                    prefix = digest.hexdigest()[:_DIGEST_DIGITS]
            found[file] = FileSummary(
                num_documents, num_bytes, digest.hexdigest()[:_DIGEST_DIGITS], prefix
            )
        return found

    def fingerprint(self, split: Split) -> str:
        """A hash of the ids and contents of ``split``."""
        if split not in self._fingerprints:
            digest = hashlib.sha256()
            for entry in self._select(split):
                digest.update(_framed(entry.id) + entry.digest)
            self._fingerprints[split] = digest.hexdigest()
        return self._fingerprints[split]

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

    def _read_again(self) -> Iterator[Document]:
        """Every document once more; DataError names the file that is not as it was scanned."""
        again = (document for document in self._read() if document is not None)
        last: Entry | None = None
        for entry, document in zip_longest(self._scan(), again):
            if entry is None or document is None or Entry.of(document) != entry:
                raise DataError(self._changed(last, entry, document))
            yield document
            last = entry

    def _changed(self, last: Entry | None, entry: Entry | None, document: Document | None) -> str:
        """What happened where ``document`` came after ``last``, and not ``entry``."""
        files = {self.file_of(known.id): None for known in self._scan()}
        expected = None if entry is None else self.file_of(entry.id)
        came = None if document is None else self.file_of(document.id)
        if came is not None and came not in files:
            file, event = came, "appeared"
        elif came is not None and last is not None and came == self.file_of(last.id) != expected:
            file, event = came, "grew"
        else:
            file, event = expected or came or "", "changed"
        label = file_label(self.name, file, is_only=len(files) == 1)
        return f"{label} {event} while it was read; start again once nothing writes to it."

    def _scan(self) -> list[Entry]:
        if self._entries is None:
            entries: list[Entry] = []
            num_skipped = 0
            for document in self._read():
                if document is None:
                    num_skipped += 1
                    continue
                entries.append(Entry.of(document))
            self.num_skipped = num_skipped
            self._held_out_flags = self._held_out(entries)
            self._entries = entries
        return self._entries


def _framed(text: str) -> bytes:
    """``text`` with its length before it, so that two in a row cannot be cut otherwise."""
    payload = text.encode()
    return f"{len(payload)}:".encode() + payload
