"""One token a byte: no training, no unknown text, long sequences."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from ultrathink.config.tokenizer import ByteTokenizerConfig
from ultrathink.data.documents import replace_surrogates
from ultrathink.data.tokenizers.base import TokenArray, join_bytes, write_meta

_PIECES = (*(bytes([value]) for value in range(256)), b"")


class ByteTokenizer:
    """Ids 0 to 255 are the bytes of UTF-8, 256 is the end-of-text token."""

    vocab_size = 257
    eot_id = 256

    @classmethod
    def train(cls, config: ByteTokenizerConfig, texts: Iterable[str]) -> Self:
        """There is nothing to learn; ``texts`` are not read."""
        return cls()

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides the ids."""
        return hashlib.sha256(b"byte 256").hexdigest()

    def encode(self, text: str) -> list[int]:
        """The bytes of ``text``."""
        return list(replace_surrogates(text).encode())

    def encode_batch(self, texts: Sequence[str]) -> list[TokenArray]:
        """The bytes of each text, ``uint32``."""
        return [
            np.frombuffer(replace_surrogates(text).encode(), dtype=np.uint8).astype(np.uint32)
            for text in texts
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ``ids``; the end-of-text token has none."""
        return join_bytes(ids, _PIECES)

    def save(self, folder: Path) -> None:
        """Write the file that says a folder holds this tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        write_meta(folder, "byte", self)

    @classmethod
    def load(cls, folder: Path, meta: dict[str, Any]) -> Self:
        """Read back what ``save`` wrote."""
        return cls()
