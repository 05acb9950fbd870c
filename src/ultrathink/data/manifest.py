"""The identity of files: their stat, which shows what may have changed, and their hash.

As in Git's index, a file whose stat is the recorded one is not read. A stat does not show a change
within the same tick of the clock. A file that changed less than two seconds before it was recorded
therefore gets a stat that nothing matches, and is hashed the next time
(https://git-scm.com/docs/racy-git).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from ultrathink.core.files import write_atomic
from ultrathink.data.checksums import sealed, unsealed
from ultrathink.data.documents import FileSummary

FORMAT = 2  # raise it when the same file gives other documents
_RACY_NS = 2 * 10**9
_UNSETTLED = -1
_MAX_TICK_S = 3.0  # the coarsest clock of a file system has ticks of two seconds


class Stat(NamedTuple):
    """What changes with a file: mtime and ctime with its content, the inode when it is replaced.

    The ctime cannot be set: it changes even where size and mtime are restored.
    """

    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> Self:
        """The stat of ``path``; OSError where it is missing."""
        found = path.stat()
        return cls(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)

    def settled(self) -> Self:
        """The stat to record: one that nothing matches where the file changed just before.

        The same holds for a time in the future, left by a clock that was set back.
        """
        changed_ns = max(self.mtime_ns, self.ctime_ns)
        is_settled = changed_ns + _RACY_NS <= time.time_ns()
        return self if is_settled else self._replace(ctime_ns=_UNSETTLED)


@dataclass(frozen=True, slots=True)
class FileEntry:
    """The state of a file when it was read."""

    stat: Stat
    sha256: str
    documents: FileSummary | None = None
    """What a source found in it; None for a token store's file."""

    def to_json(self) -> list[Any]:
        """``[size, mtime_ns, ctime_ns, inode, sha256, documents]``."""
        documents = None if self.documents is None else astuple(self.documents)
        return [*self.stat, self.sha256, documents]

    @classmethod
    def from_json(cls, values: list[Any]) -> Self:
        """Read back what ``to_json`` gave."""
        *stat, sha256, documents = values
        return cls(Stat(*stat), sha256, None if documents is None else FileSummary(*documents))


Manifest = dict[str, FileEntry]
"""Files by name, in the order of reading."""


def read_manifest(path: Path) -> Manifest:
    """The manifest of a source; empty where none can be used, so that it is rebuilt."""
    with suppress(OSError, ValueError):
        values = unsealed(json.loads(path.read_text(encoding="utf-8")))
        if values is not None and values["format"] == FORMAT:
            return {name: FileEntry.from_json(entry) for name, entry in values["files"].items()}
    return {}


def write_manifest(path: Path, manifest: Mapping[str, FileEntry]) -> None:
    """Save ``manifest``; where that fails, the next start reads all files."""
    files = {name: entry.to_json() for name, entry in manifest.items()}
    with suppress(OSError):  # a read-only cache is useful, too
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(sealed({"format": FORMAT, "files": files})))


def wait_for_tick(folder: Path, stats: Iterable[Stat]) -> None:
    """Return once a change in ``folder`` gets a later ctime than those of ``stats``."""
    last_ns = max(stat.ctime_ns for stat in stats)
    probe, until = folder / ".tick", time.monotonic() + _MAX_TICK_S
    while time.monotonic() < until:
        probe.touch()
        if probe.stat().st_ctime_ns > last_ns:
            break
        time.sleep(0.001)
    probe.unlink(missing_ok=True)  # another process may use the same file
