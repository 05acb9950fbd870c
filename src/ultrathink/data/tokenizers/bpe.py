"""Byte-level byte-pair encoding (https://arxiv.org/abs/1508.07909), learned from the documents.

Merges are learned by Hugging Face ``tokenizers`` and saved as its standard ``tokenizer.json``.
Text is encoded by ``tiktoken``, about eight times as fast, where a check after training shows
that both give the same ids.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from ultrathink.config.tokenizer import BpeTokenizerConfig
from ultrathink.core.errors import DataError
from ultrathink.data.documents import replace_surrogates
from ultrathink.data.tokenizers.base import (
    END_OF_TEXT,
    DamagedTokenizerError,
    TokenArray,
    Tokenizer,
    damaged,
)
from ultrathink.data.tokenizers.byte_names import BYTE_OF_NAME
from ultrathink.data.tokenizers.patterns import PATTERNS

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

Engine = Literal["tiktoken", "tokenizers"]
TOKENIZER_FILE = "tokenizer.json"
_NUM_THREADS = min(8, os.cpu_count() or 1)
_CHECKED_CHARACTERS = 500_000  # of the training text, to compare the two libraries
_MIN_FREQUENCY = 2  # a pair seen once would save nothing

# Texts on which two implementations of the same pattern and merges could differ.
AWKWARD_TEXTS = (
    "",
    " ",
    "naïve café, Straße, Ελληνικά, Русский, 中文字符, 日本語のテスト, हिन्दी, العربية, עברית",
    "👩‍👩‍👧‍👦 🇩🇪 👍🏽 ❤️ \U0001f9ff e\u0301 \u200b\u200d\ufeff\u2028\u2029\u0085\u00a0\u3000",
    "tabs\t\t\tspaces          \n\n\n   \n\t \n  end   ",
    "line\r\nline\r\n\r\n  line\rline\n\r\n",
    "\x00\x01\x02\x1b[0m\x7f\x1c\x1d\x1e\x1f\x0b\x0c",
    f"plain {END_OF_TEXT} text <|fim|> </s> [INST]",
    "don't I'LL we'Ve '\u017f it's'S 12345678 1,000.00 ½ ² Ⅷ ٣٤٥",
    "def f(x):\n    if x == 0:\n\n        return {'a': [1, 2]}  # note\n\n\nclass A:\n\tpass\n",
    "=" * 300 + "a" * 300 + " " * 1500 + "x" + "\n" * 700 + "é" * 200,
    "\ufffd\U0010ffff\u0378\ue000\ud7ff",
)


class BpeTokenizer(Tokenizer):
    """Byte-pair encoding over the bytes of UTF-8; id 0 is the end-of-text token."""

    type = "bpe"

    def __init__(self, definition: str, engine: Engine) -> None:
        """``definition`` is the content of a ``tokenizer.json`` that ``train`` wrote."""
        parsed = json.loads(definition)
        vocab: dict[str, int] = dict(parsed["model"]["vocab"])
        self.definition = definition
        self.engine = engine
        self._pattern: str = parsed["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
        self.token_bytes = [b""] * len(vocab)
        self.eot_id = vocab.pop(END_OF_TEXT)
        self._ranks = {bytes(map(BYTE_OF_NAME.__getitem__, name)): i for name, i in vocab.items()}
        for content, token in self._ranks.items():
            self.token_bytes[token] = content

    @classmethod
    def train(cls, config: BpeTokenizerConfig, texts: Iterable[str]) -> Self:
        """Learn merges from at most ``config.train_bytes`` of ``texts``.

        The result depends on the options and the contents only. DataError where there is no
        text. A small text may give fewer tokens than ``config.vocab_size``.
        """
        checked: list[str] = []
        definition = _learn(config, _limited(texts, config.train_bytes, checked))
        if not checked:
            raise DataError(
                "tokenizer.type bpe: there is no text to learn from; data.train is empty."
            )
        fast = cls(definition, "tiktoken")
        reference = cls(definition, "tokenizers")
        samples = [*AWKWARD_TEXTS, *checked]
        pairs = zip(fast.encode_batch(samples), reference.encode_batch(samples), strict=True)
        return fast if all(np.array_equal(ours, theirs) for ours, theirs in pairs) else reference

    def _identity(self) -> str:
        return f"{self.engine}\n{self.definition}"

    def _files(self) -> dict[str, str]:
        return {TOKENIZER_FILE: self.definition}  # Hugging Face reads it, too

    def _meta(self) -> dict[str, str]:
        return {"engine": self.engine}

    def encode(self, text: str) -> list[int]:
        text = replace_surrogates(text)
        if self.engine == "tiktoken":
            return self._tiktoken.encode_ordinary(text)
        ids: list[int] = self._standard.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[TokenArray]:
        """Token ids of each text, ``uint32``, on up to eight threads."""
        texts = [replace_surrogates(text) for text in texts]
        if self.engine == "tokenizers":
            encodings = self._standard.encode_batch_fast(texts, add_special_tokens=False)
            return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]
        encoding = self._tiktoken

        def encode(text: str) -> TokenArray:
            # Naming no special token, allowed or not, makes all of the text plain text.
            return encoding.encode_to_numpy(text, disallowed_special=())

        if len(texts) == 1 or _NUM_THREADS == 1:
            return [encode(text) for text in texts]
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            return list(pool.map(encode, texts))

    @classmethod
    def load(cls, folder: Path, meta: dict[str, Any]) -> Self:
        path = folder / TOKENIZER_FILE
        if meta.get("engine") not in ("tiktoken", "tokenizers"):
            raise damaged(folder, f"unknown engine {meta.get('engine')!r}")
        try:
            return cls(path.read_text(encoding="utf-8"), meta["engine"])
        except FileNotFoundError:
            raise DamagedTokenizerError(
                f"{path}: there is no such file; copy the whole tokenizer folder.",
                f"{TOKENIZER_FILE} is missing",
            ) from None
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise damaged(path, repr(error)) from error

    @cached_property
    def _tiktoken(self) -> tiktoken.Encoding:
        import tiktoken

        return tiktoken.Encoding(
            "ultrathink",
            pat_str=self._pattern,
            mergeable_ranks=self._ranks,
            special_tokens={END_OF_TEXT: self.eot_id},
        )

    @cached_property
    def _standard(self) -> tokenizers.Tokenizer:
        import tokenizers

        standard = tokenizers.Tokenizer.from_str(self.definition)
        standard.encode_special_tokens = True  # written-out ones are plain text
        return standard


def _limited(texts: Iterable[str], num_bytes: int, checked: list[str]) -> Iterator[str]:
    """``texts`` up to ``num_bytes`` of UTF-8; the first of them are kept in ``checked``."""
    left = num_bytes
    to_check = _CHECKED_CHARACTERS
    for text in map(replace_surrogates, texts):
        payload = text.encode()
        if len(payload) > left:
            text = payload[:left].decode(errors="ignore")
        if text:
            if to_check > 0:
                checked.append(text[:to_check])
                to_check -= len(checked[-1])
            yield text
        left -= len(payload)
        if left <= 0:
            return


def _learn(config: BpeTokenizerConfig, texts: Iterator[str]) -> str:
    """Train on ``texts``; the content of a ``tokenizer.json``."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERNS[config.pattern]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=_MIN_FREQUENCY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    definition = json.loads(tokenizer.to_str())
    model = definition["model"]
    model["merges"] = _all_merges(model["vocab"])
    model["ignore_merges"] = True
    return json.dumps(definition, ensure_ascii=False, indent=1) + "\n"


def _all_merges(vocab: dict[str, int]) -> list[list[str]]:
    """Every pair of tokens that makes a third, by the third's id.

    Training keeps only the pair that it met. tiktoken merges any two neighbours that make a known
    token, lowest id first; with all pairs listed, and whole words looked up first, Hugging Face
    reads the saved file in the same way.
    """
    merges = []
    for name in sorted(vocab, key=vocab.__getitem__):
        if name == END_OF_TEXT:
            continue
        for cut in range(1, len(name)):
            left, right = name[:cut], name[cut:]
            if left in vocab and right in vocab:
                merges.append([left, right])
    return merges
