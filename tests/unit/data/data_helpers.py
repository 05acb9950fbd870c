"""Small stores and loaders for tests."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ultrathink.config.data import DataConfig, PackingConfig
from ultrathink.data.batch import Batch
from ultrathink.data.cache import TokenStore, build_store
from ultrathink.data.documents import Document
from ultrathink.data.loader import TrainLoader
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


def loader_of(
    stores: Sequence[TokenStore], weights: Sequence[float] = (2.0, 1.0), **options: Any
) -> TrainLoader:
    """Batches of three sequences of eight tokens, unless ``options`` say otherwise."""
    packing = PackingConfig()
    shape = {"seq_len": 8, "batch_size": 3, "packing": packing, "seed": 11, **options}
    return TrainLoader(stores, weights[: len(stores)], **shape)


def planes(batch: Batch) -> list[Tensor]:
    """The five fields ``[B, T]``, in order."""
    names = ("input_ids", "labels", "positions", "document_ids", "source_ids")
    return [batch.tensors()[name] for name in names]


def write_crawl(folder: Path, numbers: Iterable[int], **more: str) -> None:
    """A line of JSON for each number."""
    lines = [json.dumps({"text": f"page {number} " * 9, **more}) for number in numbers]
    (folder / "crawl.jsonl").write_text("".join(line + "\n" for line in lines))


def books_and_crawl(folder: Path, **options: Any) -> DataConfig:
    """A folder of text, and a file of JSON lines."""
    train = [
        {"type": "text", "path": str(folder / "books"), "weight": 3},
        {"type": "jsonl", "path": str(folder / "crawl.jsonl"), "on_bad": "skip"},
    ]
    return DataConfig.model_validate({"train": train, "seq_len": 16, **options})
