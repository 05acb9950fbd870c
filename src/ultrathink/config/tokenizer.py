"""Section ``tokenizer``: how text becomes token ids."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import Annotated, Any, Literal

from ultrathink.config.base import PartConfig, PartOf
from ultrathink.config.options import fixed
from ultrathink.core.registry import Registry

TOKENIZERS: Registry[Any] = Registry("tokenizer")

tokens = partial(fixed, because="the token ids would stand for other text")


class TokenizerConfig(PartConfig, ABC):
    """What every tokenizer has."""

    @abstractmethod
    def size(self) -> int:
        """Number of ids that this tokenizer may produce, special tokens included."""


class BpeTokenizerConfig(TokenizerConfig):
    """Byte-level byte-pair encoding, trained on the training documents."""

    type: Literal["bpe"] = "bpe"
    vocab_size: int = tokens(4096, ge=257, lt=2**31)
    """Number of tokens, the 256 bytes and specials included."""
    train_bytes: int = tokens(30_000_000, gt=0)
    """At most this many bytes of text are read to learn merges."""
    pattern: Literal["gpt4", "code", "gpt2"] = tokens("gpt4")
    """How text is cut into words before merging: as GPT-4 and GPT-2 do, or `code`, which keeps a
    line break and the next line's indentation in one piece."""

    def size(self) -> int:
        return self.vocab_size


class ByteTokenizerConfig(TokenizerConfig):
    """One token a byte."""

    type: Literal["byte"] = "byte"

    def size(self) -> int:
        return 257  # 256 bytes and the end-of-text token


class HuggingFaceTokenizerConfig(TokenizerConfig):
    """The tokenizer that came with pretrained weights; `training.init_from=hf:…` sets it."""

    type: Literal["hf"] = "hf"
    vocab_size: int = tokens(1, gt=0, lt=2**31)
    """Number of ids; taken from the tokenizer itself."""

    def size(self) -> int:
        return self.vocab_size


TOKENIZERS.add("bpe", "ultrathink.data.tokenizers.bpe:BpeTokenizer", options=BpeTokenizerConfig)
TOKENIZERS.add("byte", "ultrathink.data.tokenizers.byte:ByteTokenizer", options=ByteTokenizerConfig)
TOKENIZERS.add(
    "hf",
    "ultrathink.data.tokenizers.huggingface:HuggingFaceTokenizer",
    options=HuggingFaceTokenizerConfig,
)

TokenizerField = Annotated[TokenizerConfig, PartOf(TOKENIZERS)]
