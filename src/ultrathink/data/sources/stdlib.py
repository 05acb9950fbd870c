"""The Python source of the running interpreter's standard library: about 10 MB, always there."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from ultrathink.config.data import StdlibSourceConfig
from ultrathink.core.errors import DataError
from ultrathink.data.documents import Document, is_held_out
from ultrathink.data.sources.base import Entry, ScannedSource
from ultrathink.data.sources.files import reading

# Installed packages are not the library. Test packages and the code tables of `encodings` make
# held-out scores easy, and slim installations lack them.
LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"})


class StdlibSource(ScannedSource):
    """Every readable ``.py`` file of the standard library; ids are posix paths relative to it.

    A file is held out when the SHA-256 of its id, as a number, is divisible by 20.
    """

    def __init__(self, config: StdlibSourceConfig, root: Path | None = None) -> None:
        super().__init__(config.name or config.type)
        self.root = root or Path(sysconfig.get_path("stdlib"))
        if not self.root.is_dir():
            raise DataError(
                f"data source {self.name!r}: the standard library's folder {self.root} does not "
                f"exist in this Python; train on files of your own: {{type: text, path: …}}."
            )

    def _read(self) -> Iterator[Document | None]:
        for document_id in sorted(self._paths()):
            try:
                with reading(self.root / document_id):
                    text = (self.root / document_id).read_bytes().decode()
            except UnicodeDecodeError:
                continue  # part of the rule, and so not counted as skipped
            yield Document(document_id, text)

    def _paths(self) -> Iterator[str]:
        for folder, subfolders, files in os.walk(self.root):
            subfolders[:] = [name for name in subfolders if name not in LEFT_OUT]
            for name in files:
                if name.endswith(".py"):
                    yield Path(folder, name).relative_to(self.root).as_posix()

    def _held_out(self, entries: list[Entry]) -> list[bool]:
        return [is_held_out(entry.id) for entry in entries]
