"""One token a byte: no training, no unknown text, long sequences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from ultrathink.config.tokenizer import ByteTokenizerConfig
from ultrathink.data.documents import replace_surrogates
from ultrathink.data.tokenizers.base import ByteVocabulary, TokenArray


class ByteTokenizer(ByteVocabulary):
    """Ids 0 to 255 are the bytes of UTF-8, 256 is the end-of-text token."""

    type = "byte"
    eot_id = 256
    token_bytes = (*(bytes([value]) for value in range(256)), b"")

    @classmethod
    def train(cls, config: ByteTokenizerConfig, texts: Iterable[str]) -> Self:
        """A tokenizer; there is nothing to learn, and ``texts`` are not read."""
        return cls()

    def _identity(self) -> str:
        return "byte 256"

    def encode(self, text: str) -> list[int]:
        """The bytes of ``text``."""
        return list(replace_surrogates(text).encode())

    def encode_batch(self, texts: Sequence[str]) -> list[TokenArray]:
        """The bytes of each text, ``uint32``."""
        return [
            np.frombuffer(replace_surrogates(text).encode(), dtype=np.uint8).astype(np.uint32)
            for text in texts
        ]

    @classmethod
    def load(cls, folder: Path, meta: dict[str, Any]) -> Self:
        """Read back what ``save`` wrote."""
        return cls()
