"""Documents, and the summary of a file of them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ultrathink.core.errors import DataError

Split = Literal["train", "val", "all"]
Verify = Literal["stat", "full"]  # hash the files whose stat changed, or all of them

# Called with what is being done, the UTF-8 bytes that are done, and how many there are.
Progress = Callable[[str, int, int], None]

HELD_OUT_ONE_IN = 20
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Document:
    """One text; its ``id`` is unique within the source and the same on every machine."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class FileSummary:
    """What a file of a source held when it was read."""

    num_documents: int
    num_bytes: int  # UTF-8 bytes of the documents' text
    digest: str  # SHA-256 over the documents and their places in the file
    num_skipped: int  # unreadable documents that were left out
    lowest: int  # least hash of a document (its first 64 bits), by which many are held out
    highest: int  # greatest hash


class UnreadableSourceError(DataError):
    """A source whose text is missing or cannot be read."""

    def __init__(self, problem: str, advice: str = ".") -> None:
        """``problem`` is a clause; ``advice`` follows it and ends the sentence."""
        super().__init__(problem + advice)
        self.problem = problem


def is_held_out(document_id: str) -> bool:
    """Whether a document is kept for validation: one in 20, by the SHA-256 of its id."""
    digest = hashlib.sha256(document_id.encode()).hexdigest()
    return int(digest, 16) % HELD_OUT_ONE_IN == 0


def replace_surrogates(text: str) -> str:
    """``text`` with U+FFFD in place of lone surrogates, which UTF-8 cannot encode."""
    return _SURROGATE.sub("\ufffd", text) if _SURROGATE.search(text) else text


def file_label(source_name: str, file: str, *, is_only: bool) -> str:
    """A file's name in messages: ``books/a.txt``, or ``a.txt`` where it is the whole source."""
    stem = file.rpartition(".")[0] or file
    return file if is_only and source_name in (file, stem) else f"{source_name}/{file}"
