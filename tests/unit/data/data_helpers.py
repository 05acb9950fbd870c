"""Small stores for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ultrathink.data.cache import TokenStore, build_store
from ultrathink.data.documents import Document
from ultrathink.data.tokenizers.base import Tokenizer
from ultrathink.data.tokenizers.byte import ByteTokenizer


class ArrayStore:
    """Documents given as lists of ids, held in memory; 0 is the end-of-text token."""

    eot_id = 0

    def __init__(self, documents: Sequence[Sequence[int]]) -> None:
        stream = [token for document in documents for token in [*document, self.eot_id]]
        self.tokens = np.array(stream, dtype=np.uint16)
        ends = np.cumsum([len(document) + 1 for document in documents])
        self.offsets = np.array([0, *ends], dtype=np.int64)


def store_of(
    folder: Path, texts: Sequence[str], tokenizer: Tokenizer | None = None, name: str = "texts"
) -> TokenStore:
    """A store on disk of ``texts``, one token a byte unless a tokenizer is given."""
    documents = (Document(str(number), text) for number, text in enumerate(texts))
    build_store(folder, documents, tokenizer or ByteTokenizer())
    return TokenStore(folder, name)
