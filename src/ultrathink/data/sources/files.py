"""Sources that read the user's files: which files a path stands for, and what is held out."""

from __future__ import annotations

import glob
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ultrathink.config.data import FileSourceConfig
from ultrathink.core.errors import DataError
from ultrathink.data.checksums import FileStart
from ultrathink.data.documents import (
    Document,
    Split,
    UnreadableSourceError,
    Verify,
    replace_surrogates,
)
from ultrathink.data.file_kinds import kind_of
from ultrathink.data.sources.base import Source

MIN_DOCUMENTS_FOR_HASH = 20
_START_BYTES = 2**16  # what ``check`` reads of each file


class FileSource(Source):
    """Documents from files; ``val_fraction`` of them is held out.

    Of 20 documents or more, whole ones are held out: those whose text hashes below the fraction.
    Two copies of a text are then never on both sides, and adding documents moves none across. Of
    fewer, the end of each is held out, from a line break where one is near.
    """

    suffixes: frozenset[str] | None = None
    """Which files of a folder are read; all where it is None."""

    def __init__(self, config: FileSourceConfig) -> None:
        paths = (config.path,) if isinstance(config.path, str) else config.path
        name = config.name or _default_name(paths, config.type)
        found = expand_paths(paths, self.suffixes, name)
        reading = config.model_dump(
            mode="json", exclude={"name", "weight", "groups", "val_fraction"}
        )
        reading["path"] = [os.path.abspath(os.path.expanduser(path)) for path in paths]
        super().__init__(name, {file: at for file, (at, _) in found.items()}, reading)
        self.found_in_folders = {file for file, (_, in_folder) in found.items() if in_folder}
        self.val_fraction = config.val_fraction
        self.on_bad = config.on_bad
        self._threshold: int | None = None

    def scan(self, manifests: Path | None = None, verify: Verify = "stat") -> None:
        """Find out what each file holds, and which documents are held out."""
        super().scan(manifests, verify)
        files = self.files().values()
        is_whole = sum(found.num_documents for found in files) >= MIN_DOCUMENTS_FOR_HASH
        self._threshold = None  # the end of each document is held out
        if is_whole or self.val_fraction == 0:
            self._threshold = int(self.val_fraction * 2**64)
        if self._threshold and is_whole:
            # Among few documents a side may be empty by chance: it gets the nearest hash.
            lowest = min(found.lowest for found in files)
            highest = max(found.highest for found in files)
            self._threshold = min(max(self._threshold, lowest + 1), highest)

    def check(self) -> None:
        """DataError where the start of a file cannot be read as documents; the rest is not read."""
        for file, path in self._paths.items():
            if path is not None:
                for _ in self._read(file, FileStart(path, _START_BYTES)):
                    pass

    def documents(self, split: Split) -> Iterator[Document]:
        """The documents of ``split``, in the order of the files."""
        self._summaries()
        if split == "all" or self._threshold is not None:
            yield from super().documents(split)
            return
        for document in super().documents("all"):
            cut = _cut_position(document.text, self.val_fraction)
            text = document.text[cut:] if split == "val" else document.text[:cut]
            if text:
                yield Document(document.id, text)

    def _is_held_out(self, document: Document, key: int) -> bool:
        return self._threshold is not None and key < self._threshold

    def _held_out_share(self) -> float:
        return self.val_fraction

    def _rule(self) -> str:
        return repr(self.val_fraction)


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
    paths: tuple[str, ...], suffixes: frozenset[str] | None, source_name: str
) -> dict[str, tuple[Path, bool]]:
    """The files that ``paths`` stand for, by unique ids, each with whether a folder held it.

    A folder stands for the files in it, at any depth, that have one of ``suffixes``, without hidden
    ones. DataError names a path that is missing or stands for no file.
    """
    if not paths:
        raise DataError(f"data source {source_name!r}: path is empty; name a file or folder.")
    files: dict[str, tuple[Path, bool]] = {}
    seen: set[str] = set()
    for path in paths:
        with reading(Path(path)):
            here = list(_expand(os.path.expanduser(path), suffixes))
        if not here:
            raise _nothing_there(path, source_name)
        for name, file, in_folder in here:
            if file in seen:
                continue
            seen.add(file)
            # A name may hold bytes that are not UTF-8, which Python keeps as lone surrogates.
            file_id, number = replace_surrogates(name), 2
            while file_id in files:
                file_id, number = f"{replace_surrogates(name)}#{number}", number + 1
            files[file_id] = Path(file), in_folder
    return files


def _expand(path: str, suffixes: frozenset[str] | None) -> Iterator[tuple[str, str, bool]]:
    """Files below one path: id, real path, and whether a folder held it.

    Ids are relative to the folder, or to the part of a pattern without magic.
    """
    whole = Path(path)
    if whole.is_file():
        yield whole.name, os.path.realpath(path), False
    elif whole.is_dir():
        for file_id, file in sorted(_below(os.path.realpath(path))):
            suffix = Path(file_id.lower().removesuffix(".gz")).suffix
            if suffixes is None or suffix in suffixes:
                yield file_id, file, True
    elif glob.has_magic(path):
        fixed = whole
        while glob.has_magic(str(fixed)):
            fixed = fixed.parent
        for match in sorted(glob.glob(path, recursive=True)):
            if os.path.isfile(match):
                yield Path(match).relative_to(fixed).as_posix(), os.path.realpath(match), False


def _below(folder: str, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The files of a folder at any depth: their paths relative to it, and their real paths."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from _below(entry.path, f"{prefix}{entry.name}/")
            elif entry.is_file():
                real = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
                yield f"{prefix}{entry.name}", real


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
    except (OSError, EOFError, zlib.error) as error:  # the last two of a gzip file that is cut
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        name = getattr(error, "filename", None) or path
        raise UnreadableSourceError(f"{name}: cannot be read ({reason})") from error


def refuse_binary(path: Path, head: bytes) -> None:
    """DataError where a file that begins with ``head`` is of a kind that is no text."""
    found = kind_of(head)
    if found is not None:
        kind, advice = found
        raise UnreadableSourceError(
            f"{path} is {kind}, not text", f": {advice.replace('{}', path.name)}."
        )
