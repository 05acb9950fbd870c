"""Sources that read the user's files: which files a path means, and what is held out of them."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ultrathink.config.data import FileSourceConfig
from ultrathink.core.errors import DataError
from ultrathink.data.documents import Document, Split, UnreadableSourceError, replace_surrogates
from ultrathink.data.sources.base import Entry, ScannedSource

MIN_DOCUMENTS_FOR_HASH = 20


class FileSource(ScannedSource):
    """Documents from files; ``val_fraction`` of them is held out.

    With 20 documents or more whole ones are held out: those whose text hashes below the
    fraction, so that two copies of a text are never on both sides, and adding documents moves
    none across. With fewer, the end of each document is held out, from a line break where one
    is near.
    """

    def __init__(self, config: FileSourceConfig, keeps_in_folder: Callable[[Path], bool]) -> None:
        paths = (config.path,) if isinstance(config.path, str) else config.path
        super().__init__(config.name or _default_name(paths, config.type))
        self.val_fraction = config.val_fraction
        self.on_bad = config.on_bad
        self._cut_sizes: dict[Split, int] = {}  # where documents are cut, bytes of each side
        self.paths = expand_paths(paths, keeps_in_folder, self.name)

    def documents(self, split: Split) -> Iterator[Document]:
        """The documents of ``split``, in the order of the files."""
        if split == "all" or not self._cuts_documents():
            yield from super().documents(split)
            return
        for document in super().documents("all"):
            cut = _cut_position(document.text, self.val_fraction)
            text = document.text[cut:] if split == "val" else document.text[:cut]
            if text:
                yield Document(document.id, text)

    def fingerprint(self, split: Split) -> str:
        """A hash of the ids and contents of ``split``."""
        if split == "all" or not self._cuts_documents():
            return super().fingerprint(split)
        # Where a document is cut follows from its text and the fraction.
        parts = f"cut {split} {self.val_fraction!r} {super().fingerprint('all')}"
        return hashlib.sha256(parts.encode()).hexdigest()

    def num_bytes(self, split: Split) -> int:
        """UTF-8 bytes of all documents of ``split``."""
        if split == "all" or not self._cuts_documents():
            return super().num_bytes(split)
        if split not in self._cut_sizes:
            self._cut_sizes[split] = sum(len(d.text.encode()) for d in self.documents(split))
        return self._cut_sizes[split]

    def _cuts_documents(self) -> bool:
        return self.val_fraction > 0 and len(self._scan()) < MIN_DOCUMENTS_FOR_HASH

    def _held_out(self, entries: list[Entry]) -> list[bool]:
        if self.val_fraction == 0 or len(entries) < MIN_DOCUMENTS_FOR_HASH:
            return [False] * len(entries)
        threshold = int(self.val_fraction * 2**64)
        hashes = [int.from_bytes(entry.digest[:8], "big") for entry in entries]
        # Chance may leave a side empty among few documents; the nearest hash goes there.
        threshold = min(max(threshold, min(hashes) + 1), max(hashes))
        return [value < threshold for value in hashes]


def _default_name(paths: tuple[str, ...], source_type: str) -> str:
    stem = Path(paths[0]).stem if len(paths) == 1 else ""
    return stem if stem and not glob.has_magic(stem) else source_type


def _cut_position(text: str, val_fraction: float) -> int:
    """Index of the first held-out character."""
    num_held_out = max(1, round(len(text) * val_fraction))
    cut = len(text) - num_held_out
    slack = num_held_out // 2
    before = text.rfind("\n", max(0, cut - slack), cut)
    if before >= 0:
        return before + 1
    after = text.find("\n", cut, cut + slack)
    return after + 1 if after >= 0 else cut


def expand_paths(
    paths: tuple[str, ...], keeps_in_folder: Callable[[Path], bool], source_name: str
) -> list[tuple[str, Path]]:
    """The files that ``paths`` mean, each once, with an id that no two of them share.

    A folder stands for the files in it, at any depth, that ``keeps_in_folder`` accepts; hidden
    ones are left out. DataError names a path that is missing or means no file.
    """
    if not paths:
        raise DataError(f"data source {source_name!r}: path is empty; name a file or folder.")
    found: dict[Path, str] = {}
    for path in paths:
        with reading(Path(path)):
            here = list(_expand(os.path.expanduser(path), keeps_in_folder))
        if not here:
            raise _nothing_there(path, source_name)
        for file_id, file in here:
            # A name may hold bytes that are not UTF-8, which Python keeps as lone surrogates.
            found.setdefault(file.resolve(), replace_surrogates(file_id))
    ids: set[str] = set()
    files: list[tuple[str, Path]] = []
    for file, file_id in found.items():
        unique, number = file_id, 2
        while unique in ids:
            unique, number = f"{file_id}#{number}", number + 1
        ids.add(unique)
        files.append((unique, file))
    return files


def _expand(path: str, keeps_in_folder: Callable[[Path], bool]) -> Iterator[tuple[str, Path]]:
    """Files below one path, with ids relative to the folder or to the fixed part of a pattern."""
    whole = Path(path)
    if whole.is_file():
        yield whole.name, whole
    elif whole.is_dir():
        for file in sorted(whole.rglob("*"), key=lambda file: file.as_posix()):
            relative = file.relative_to(whole)
            hidden = any(part.startswith(".") for part in relative.parts)
            if not hidden and file.is_file() and keeps_in_folder(file):
                yield relative.as_posix(), file
    elif glob.has_magic(path):
        fixed = whole
        while glob.has_magic(str(fixed)):
            fixed = fixed.parent
        for match in sorted(glob.glob(path, recursive=True)):
            if os.path.isfile(match):
                yield Path(match).relative_to(fixed).as_posix(), Path(match)


def _nothing_there(path: str, source_name: str) -> UnreadableSourceError:
    where = f"data source {source_name!r}: path {path!r}"
    if Path(path).expanduser().is_dir():
        return UnreadableSourceError(
            f"{where} is a folder without files that this source can read", "; name files in it."
        )
    if glob.has_magic(path):
        return UnreadableSourceError(f"{where} matches no file (searched from {Path.cwd()})")
    return UnreadableSourceError(f"{where} does not exist (looked from {Path.cwd()})")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns a failure to read ``path`` into a DataError that names it."""
    try:
        yield
    except OSError as error:
        raise UnreadableSourceError(
            f"{error.filename or path}: cannot be read ({error.strerror})"
        ) from error
