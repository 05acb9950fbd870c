"""UTF-8 text files, one document a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ultrathink.config.data import TextSourceConfig
from ultrathink.data.documents import Document, UnreadableSourceError
from ultrathink.data.sources.files import FileSource, reading

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


class TextSource(FileSource):
    """Text files, named or found in folders; line ends stay as they are."""

    def __init__(self, config: TextSourceConfig) -> None:
        super().__init__(config, _looks_like_text)

    def _read(self) -> Iterator[Document | None]:
        for file_id, path in self.paths:
            try:
                yield Document(file_id, _read_text(path))
            except UnreadableSourceError:
                if self.on_bad == "error":
                    raise
                yield None


def _read_text(path: Path) -> str:
    with reading(path):
        # A byte-order mark says how the file is written; it is not part of the text.
        payload = path.read_bytes().removeprefix(_BYTE_ORDER_MARK)
    try:
        return payload.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from error


def _looks_like_text(path: Path) -> bool:
    """Whether a file found in a folder is text: like Git, no NUL among its first 8,000 bytes.

    UTF-16 does hold NULs; it passes, and so does what cannot be read: the user is to hear of it.
    """
    try:
        with path.open("rb") as file:
            head = file.read(8000)
    except OSError:
        return True
    return b"\0" not in head or head.startswith(_UTF16_MARKS)


def _not_utf8(path: Path, error: UnicodeDecodeError) -> UnreadableSourceError:
    payload: bytes = error.object
    offset = error.start + (
        len(_BYTE_ORDER_MARK) if path.read_bytes().startswith(_BYTE_ORDER_MARK) else 0
    )
    encoding = "UTF-16" if payload.startswith(_UTF16_MARKS) else "ISO-8859-1"
    return UnreadableSourceError(
        f"{path}: not UTF-8 at byte {offset} (0x{payload[error.start]:02x})",
        f". Convert it, for example with `iconv -f {encoding} -t UTF-8`, or leave such files out "
        f"with `on_bad: skip`.",
    )
