"""Folders and data for the tests of ``ultrathink.data``; nothing outside tmp_path is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.data.data_helpers import store_of
from ultrathink.config.data import StdlibSourceConfig
from ultrathink.config.tokenizer import BpeTokenizerConfig
from ultrathink.data.cache import TokenStore
from ultrathink.data.sources.stdlib import StdlibSource
from ultrathink.data.tokenizers.bpe import BpeTokenizer


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ULTRATHINK_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def stdlib_texts() -> list[str]:
    """About 600 kB of the standard library, the same files each time."""
    source = StdlibSource(StdlibSourceConfig())
    return [document.text for document in source.documents("train")][::17]


@pytest.fixture(scope="session")
def bpe(stdlib_texts: list[str]) -> BpeTokenizer:
    return BpeTokenizer.train(BpeTokenizerConfig(vocab_size=1000), stdlib_texts)


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[TokenStore]:
    """Two small stores of unequal size."""
    texts = ([f"first {n} " * 3 for n in range(60)], [f"second {n} " * 5 for n in range(40)])
    folder = tmp_path_factory.mktemp("stores")
    return [store_of(folder / str(number), each) for number, each in enumerate(texts)]
