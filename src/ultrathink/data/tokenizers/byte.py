"""One token a byte: no training, no unknown text, long sequences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from ultrathink.config.tokenizer import ByteTokenizerConfig
from ultrathink.data.documents import replace_surrogates
from ultrathink.data.tokenizers.base import TokenArray, Tokenizer


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are the bytes of UTF-8, 256 is the end-of-text token."""

    type = "byte"
    eot_id = 256
    token_bytes = (*(bytes([value]) for value in range(256)), b"")

    @classmethod
    def train(cls, config: ByteTokenizerConfig, texts: Iterable[str]) -> Self:
        return cls()  # there is nothing to learn

    def _identity(self) -> str:
        return "byte 256"

    def encode(self, text: str) -> list[int]:
        return list(replace_surrogates(text).encode())

    def encode_batch(self, texts: Sequence[str]) -> list[TokenArray]:
        payloads = (replace_surrogates(text).encode() for text in texts)
        return [np.frombuffer(each, dtype=np.uint8).astype(np.uint32) for each in payloads]

    @classmethod
    def load(cls, folder: Path, meta: dict[str, Any]) -> Self:
        return cls()
