"""What a file that is no text is, by its first bytes, and how its text is reached."""

from __future__ import annotations

GZIP = b"\x1f\x8b\x08"

# First bytes, what they begin, and what to do; each holds bytes that text does not begin with.
_KINDS = (
    (b"PK\x03\x04", "a zip archive", "unpack it first: unzip {}"),
    (b"(\xb5/\xfd", "compressed by zstd", "decompress it first: zstd -d {}"),
    (b"\xfd7zXZ\0", "compressed by xz", "decompress it first: unxz {}"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it first: 7z x {}"),
    (b"%PDF-", "a PDF", "extract its text: pdftotext {}"),
    (b"SQLite format 3\0", "an SQLite database", "write its text as JSON lines"),
    (b"ARROW1\0\0", "an Arrow table", "write its text column as JSON lines"),
    (b"\x89HDF\r\n", "an HDF5 file", "write its text as JSON lines"),
    (b"\x93NUMPY", "a NumPy array", "write its text as .txt"),
    (b"\x89PNG\r\n", "a PNG image", "name text files"),
    (b"\xff\xd8\xff", "a JPEG image", "name text files"),
    (b"GIF89a", "a GIF image", "name text files"),
    (b"\x7fELF", "a program", "name text files"),
)


def kind_of(head: bytes) -> tuple[str, str] | None:
    """What begins with ``head`` and what to do with it; None where that may be text.

    ``{}`` in the advice stands for the file. UTF-16, which has zero bytes, counts as text here.
    """
    for mark, kind, advice in _KINDS:
        if head.startswith(mark):
            return kind, advice
    if head[:3] == b"BZh" and head[4:10] == b"1AY&SY":
        return "compressed by bzip2", "decompress it first: bunzip2 {}"
    if head[257:262] == b"ustar":
        return "a tar archive", "unpack it first: tar -xf {}"
    if head[:4] == b"PAR1" and not head[4:5].isalnum():
        return "a Parquet table", "write its text column as JSON lines (pandas: to_json)"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a pickle", "write its text as JSON lines"
    if head[8:10] == b'{"' and 0 < int.from_bytes(head[:8], "little") < 2**32:
        return "a safetensors file, weights of a model", "start from it with training.init_from"
    if b"\0" in head and not head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "a binary file", "name text files"
    return None
