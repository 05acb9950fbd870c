"""SHA-256 of files, and of JSON objects that carry their own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

_SEAL = "checksum"


class _Writable(Protocol):
    def write(self, data: bytes, /) -> int: ...


class HashingWriter:
    """Hands what is written on to a file, and hashes it on the way."""

    def __init__(self, file: _Writable) -> None:
        self._file = file
        self._digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Write ``data``; how many bytes that were."""
        self._digest.update(data)
        return self._file.write(data)

    def hexdigest(self) -> str:
        """The SHA-256 of all that was written."""
        return self._digest.hexdigest()


class HashedFile:
    """A file that is hashed while it is read once, from its start to its end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._digest = hashlib.sha256()

    def read(self) -> bytes:
        """All of it."""
        content = self.path.read_bytes()
        self._digest.update(content)
        return content

    def lines(self) -> Iterator[bytes]:
        """Its lines, each with its end."""
        with self.path.open("rb") as file:
            for line in file:
                self._digest.update(line)
                yield line

    def hexdigest(self) -> str:
        """The SHA-256 of what was read."""
        return self._digest.hexdigest()


def file_checksum(path: Path) -> str:
    """The SHA-256 of a file's content, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values``, ready for JSON, with a checksum of them beside."""
    return {**values, _SEAL: _checksum(values)}


def unsealed(values: Any) -> dict[str, Any] | None:
    """What ``sealed`` was given, after JSON and back; None for anything else."""
    if not isinstance(values, dict):
        return None
    content = {key: value for key, value in values.items() if key != _SEAL}
    return content if values.get(_SEAL) == _checksum(content) else None


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
