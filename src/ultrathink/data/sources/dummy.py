"""Generated text with structure to learn: a Markov chain over a few words."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from ultrathink.config.data import DummySourceConfig
from ultrathink.data.checksums import HashedFile
from ultrathink.data.documents import Document, Verify, is_held_out
from ultrathink.data.sources.base import Source

_SYLLABLES = ("ba", "ke", "li", "mo", "nu", "ra", "shi", "to")
_WORDS = tuple(first + second for first in _SYLLABLES for second in _SYLLABLES)
# A word is followed by one of four others: 1.75 bits a word, where chance would need 6.
_SUCCESSOR_SHARES = (0.5, 0.25, 0.125, 0.125)


class DummySource(Source):
    """Documents drawn from a first-order Markov chain over 64 words; equal for equal options.

    One in 20 is held out by the SHA-256 of its id, and at least one where there are two.
    """

    def __init__(self, config: DummySourceConfig) -> None:
        # All that is generated counts as one file.
        super().__init__(config.name or config.type, {config.type: None}, config.model_dump())
        self.config = config
        ids = [self._id(index) for index in range(config.num_documents)]
        self._always_held_out = ids[-1] if len(ids) > 1 and not any(map(is_held_out, ids)) else None
        # Only `random.random` gives the same numbers in every version of Python.
        chain = random.Random(config.seed)
        self._successors = [
            [int(chain.random() * len(_WORDS)) for _ in _SUCCESSOR_SHARES] for _ in _WORDS
        ]

    def scan(self, manifests: Path | None = None, verify: Verify = "stat") -> None:
        """Generate all documents once: there is no file whose stat could show a change."""
        super().scan(None, verify)

    def _read(self, file_id: str, file: HashedFile) -> Iterator[Document | None]:
        for index in range(self.config.num_documents):
            yield Document(self._id(index), self._text(index))

    def _is_held_out(self, document: Document, key: int) -> bool:
        return is_held_out(document.id) or document.id == self._always_held_out

    def _id(self, index: int) -> str:
        return f"document-{index:06d}"

    def _text(self, index: int) -> str:
        chance = random.Random((self.config.seed << 32) + index + 1)
        word = int(chance.random() * len(_WORDS))
        words = []
        for position in range(1, self.config.num_words + 1):
            ends_line = position % 12 == 0 or position == self.config.num_words
            words.append(_WORDS[word] + (".\n" if ends_line else " "))
            word = self._next(word, chance.random())
        return "".join(words)

    def _next(self, word: int, draw: float) -> int:
        for successor, share in zip(self._successors[word], _SUCCESSOR_SHARES, strict=True):
            draw -= share
            if draw < 0:
                return successor
        return self._successors[word][-1]
