"""Documents, and what a source of them offers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from ultrathink.core.errors import DataError

Split = Literal["train", "val", "all"]
Verify = Literal["stat", "full"]  # files whose stat may tell of a change are hashed, or all are

# Called with what is being done, how much of it is done, and how much there is (UTF-8 bytes).
Progress = Callable[[str, int, int], None]

HELD_OUT_ONE_IN = 20
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Document:
    """One text; ``id`` tells it apart within its source and does not depend on the machine."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class FileSummary:
    """What one file of a source held when it was read."""

    num_documents: int
    num_bytes: int  # UTF-8 bytes of the documents' text
    digest: str  # SHA-256 over the documents and their places in the file
    num_skipped: int  # unreadable documents that were left out
    lowest: int  # the least of the documents' hashes (their first 64 bits), and the greatest:
    highest: int  # what is held out of many documents is chosen by them


class UnreadableSourceError(DataError):
    """A source whose text is missing or cannot be read."""

    def __init__(self, problem: str, advice: str = ".") -> None:
        """``problem`` is a clause; ``advice`` follows it and ends the sentence."""
        super().__init__(problem + advice)
        self.problem = problem


class Source(Protocol):
    """Documents, split into those to train on and those held out.

    Iterating twice gives the same documents in the same order, or DataError where a file changed
    in between. A text never holds lone surrogates: all of it can be written as UTF-8.
    """

    name: str

    @property
    def num_skipped(self) -> int:
        """Unreadable documents that were left out."""
        ...

    def scan(self, manifests: Path | None = None, verify: Verify = "stat") -> None:
        """Find out what each file holds; reads those that the manifest does not know.

        Manifests are kept in the folder ``manifests``. ``verify: full`` hashes every file. What
        was not scanned before is when it is first used. DataError where text cannot be read.
        """
        ...

    def documents(self, split: Split) -> Iterator[Document]:
        """The documents of ``split``; ``all`` is every document, uncut."""
        ...

    def fingerprint(self, split: Split) -> str:
        """A hash of the ids and contents of ``split``: equal means the same documents."""
        ...

    def expected_bytes(self, split: Split) -> int:
        """About how many UTF-8 bytes ``split`` has, from the share that is held out."""
        ...

    def files(self) -> dict[str, FileSummary]:
        """What each file holds, by its id, in the order in which they are read."""
        ...

    def begins_with(self, file: str, known: FileSummary) -> bool:
        """Whether the first documents of ``file`` are those that ``known`` tells of."""
        ...


def is_held_out(document_id: str) -> bool:
    """Whether a document is kept for validation: one in 20, by the SHA-256 of its id."""
    digest = hashlib.sha256(document_id.encode()).hexdigest()
    return int(digest, 16) % HELD_OUT_ONE_IN == 0


def replace_surrogates(text: str) -> str:
    """``text`` with each lone surrogate, which UTF-8 cannot carry, replaced by U+FFFD."""
    return _SURROGATE.sub("\ufffd", text) if _SURROGATE.search(text) else text


def file_label(source_name: str, file: str, *, is_only: bool) -> str:
    """What messages call a file: ``books/a.txt``, or its own name where it is all of a source."""
    stem = file.rpartition(".")[0] or file
    return file if is_only and source_name in (file, stem) else f"{source_name}/{file}"
