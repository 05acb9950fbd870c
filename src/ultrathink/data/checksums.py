"""SHA-256 of files, and of JSON objects that hold their own."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from ultrathink.data.file_kinds import GZIP

_SEAL = "checksum"


class HashedFile:
    """A file that is hashed while it is read once, from its start to its end.

    The content of a gzip file is read decompressed; the hash is of the file as it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._digest = hashlib.sha256()

    def read(self) -> bytes:
        content = self.path.read_bytes()
        self._digest.update(content)
        return gzip.decompress(content) if content.startswith(GZIP) else content

    def lines(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            if is_gzip(file):
                yield from gzip.GzipFile(fileobj=cast(BinaryIO, _HashingReader(file, self._digest)))
                return
            for line in file:
                self._digest.update(line)
                yield line

    def hexdigest(self) -> str:
        """The SHA-256 of what was read."""
        return self._digest.hexdigest()


class FileStart(HashedFile):
    """The first ``size`` bytes of a file's content, cut where a line or a character ends."""

    def __init__(self, path: Path, size: int) -> None:
        super().__init__(path)
        self._size = size

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            content = (gzip.GzipFile(fileobj=file) if is_gzip(file) else file).read(self._size)
        try:
            content.decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                return content[: error.start]
        return content

    def lines(self) -> Iterator[bytes]:
        lines = self.read().splitlines(keepends=True)
        yield from lines if sum(map(len, lines)) < self._size else lines[:-1]


class _HashingReader:
    """A file that hashes what is read of it."""

    def __init__(self, file: BinaryIO, digest: hashlib._Hash) -> None:
        self._file = file
        self._digest = digest

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._digest.update(data)
        return data


def is_gzip(file: BinaryIO) -> bool:
    """Whether a file that is open at its start is a gzip file; it stays there."""
    head = file.read(len(GZIP))
    file.seek(0)
    return head == GZIP


def file_checksum(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with their checksum, ready for JSON."""
    return {**values, _SEAL: _checksum(values)}


def unsealed(values: Any) -> dict[str, Any] | None:
    """What ``sealed`` was given, read back from JSON; None for anything else."""
    if not isinstance(values, dict):
        return None
    content = {key: value for key, value in values.items() if key != _SEAL}
    return content if values.get(_SEAL) == _checksum(content) else None


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
