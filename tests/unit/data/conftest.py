"""Folders and data for the tests of ``ultrathink.data``; nothing outside tmp_path is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from ultrathink.config.data import StdlibSourceConfig
from ultrathink.config.tokenizer import BpeTokenizerConfig
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
