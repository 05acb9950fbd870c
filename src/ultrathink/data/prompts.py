"""Prompts of the text itself, for a first look at what a model writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from ultrathink.data.cache import TokenStore
from ultrathink.data.tokenizers.base import Tokenizer

NUM_PROMPTS = 2
_NUM_WORDS = 6
_MAX_CHARACTERS = 60  # of a script without spaces
_READ_TOKENS = 128
_TRIED_DOCUMENTS = 20  # of each store


def opening_words(stores: Sequence[TokenStore], tokenizer: Tokenizer) -> tuple[str, ...]:
    """The first words of two documents of ``stores``; fewer where there is no more text."""
    found = (words for store in stores for words in _openings(store, tokenizer))
    return tuple(islice(dict.fromkeys(found), NUM_PROMPTS))


def _openings(store: TokenStore, tokenizer: Tokenizer) -> Iterator[str]:
    for number in range(min(store.num_documents, _TRIED_DOCUMENTS)):
        begin, end = store.offsets[number : number + 2]
        text = tokenizer.decode(store.tokens[begin : min(end - 1, begin + _READ_TOKENS)].tolist())
        line = next(filter(None, map(str.strip, text.splitlines())), "")
        if line:
            yield " ".join(line.split()[:_NUM_WORDS])[:_MAX_CHARACTERS]
