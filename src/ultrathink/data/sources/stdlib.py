"""The Python source of the running interpreter's standard library: about 10 MB, always there."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ultrathink.config.data import StdlibSourceConfig
from ultrathink.core.errors import DataError
from ultrathink.data.checksums import HashedFile
from ultrathink.data.documents import Document, is_held_out
from ultrathink.data.sources.base import Source
from ultrathink.data.sources.files import reading

# Installed packages are not the library. Test packages and the code tables of `encodings` make
# held-out scores easy, and slim installations lack them.
LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"})


class StdlibSource(Source):
    """Every readable ``.py`` file of the standard library; ids are posix paths relative to it.

    A file is held out when the SHA-256 of its id, as a number, is divisible by 20.
    """

    def __init__(self, config: StdlibSourceConfig, root: Path | None = None) -> None:
        name, root = config.name or config.type, root or Path(sysconfig.get_path("stdlib"))
        if not root.is_dir():
            raise DataError(
                f"data source {name!r}: the standard library's folder {root} does not "
                f"exist in this Python; train on files of your own: {{type: text, path: …}}."
            )
        files = {file_id: root / file_id for file_id in sorted(_library(root))}
        super().__init__(name, files, {"type": config.type, "root": str(root.absolute())})

    def _read(self, file_id: str, file: HashedFile) -> Iterator[Document | None]:
        with reading(file.path):
            content = file.read()
        with suppress(UnicodeDecodeError):  # part of the rule, and so not counted as skipped
            yield Document(file_id, content.decode())

    def _is_held_out(self, document: Document, key: int) -> bool:
        return is_held_out(document.id)


def _library(root: Path) -> Iterator[str]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in LEFT_OUT]
        for name in files:
            if name.endswith(".py"):
                yield Path(folder, name).relative_to(root).as_posix()
