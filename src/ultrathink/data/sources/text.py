"""UTF-8 text files, one document a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ultrathink.data.checksums import FileStart, HashedFile
from ultrathink.data.documents import Document, UnreadableSourceError
from ultrathink.data.file_kinds import kind_of
from ultrathink.data.sources.files import FileSource, reading, refuse_binary

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_HEAD_BYTES = 8000
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


class TextSource(FileSource):
    """Text files, also compressed by gzip; line ends stay as they are.

    A folder may hold other files, which are left out; one that is named has to be text.
    """

    def _read(self, file_id: str, file: HashedFile) -> Iterator[Document | None]:
        try:
            # UTF-16, which holds NULs, passes here and is refused with advice.
            if file_id not in self.found_in_folders or _looks_like_text(file.path):
                yield Document(file_id, _read_text(file))
        except UnreadableSourceError:
            if self.on_bad == "error":
                raise
            yield None


def _read_text(file: HashedFile) -> str:
    with reading(file.path):
        # A byte-order mark says how the file is written; it is not part of the text.
        payload = file.read().removeprefix(_BYTE_ORDER_MARK)
    refuse_binary(file.path, payload[:_HEAD_BYTES])
    try:
        return payload.decode()
    except UnicodeDecodeError as error:
        is_marked = file.path.read_bytes().startswith(_BYTE_ORDER_MARK)
        offset = error.start + (len(_BYTE_ORDER_MARK) if is_marked else 0)
        encoding = "UTF-16" if payload.startswith(_UTF16_MARKS) else "ISO-8859-1"
        raise UnreadableSourceError(
            f"{file.path}: not UTF-8 at byte {offset} (0x{payload[error.start]:02x})",
            f". Convert it, for example with `iconv -f {encoding} -t UTF-8`, or leave such files "
            f"out with `on_bad: skip`.",
        ) from error


def _looks_like_text(path: Path) -> bool:
    with reading(path):
        return kind_of(FileStart(path, _HEAD_BYTES).read()) is None
