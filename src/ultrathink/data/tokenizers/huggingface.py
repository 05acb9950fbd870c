"""A tokenizer that came with pretrained weights, as its ``tokenizer.json`` defines it.

A special token written out in a text is split like other characters; where a model writes one, it
stands for no bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from tokenizers import Tokenizer as Definition

from ultrathink.config.tokenizer import HuggingFaceTokenizerConfig
from ultrathink.core.errors import ConfigError
from ultrathink.data.documents import replace_surrogates
from ultrathink.data.tokenizers.base import UNKNOWN_BYTES, TokenArray, Tokenizer, damaged
from ultrathink.data.tokenizers.byte_names import BYTE_OF_NAME

TOKENIZER_FILE = "tokenizer.json"
# What other programs need besides; kept unchanged for an export.
COMPANION_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
_SPACE = "\u2581"  # what SentencePiece writes for a space


class HuggingFaceTokenizer(Tokenizer):
    """The tokenizer of a ``tokenizer.json``; its ids are those of ``transformers``.

    ``eot_id`` is the token that follows each document. ``companions`` are the texts of the files
    of COMPANION_FILES that came with it, by name. Raises ValueError where the definition cannot
    be read, or does not say which bytes its tokens stand for.
    """

    type = "hf"

    def __init__(
        self, definition: str, eot_id: int, companions: Mapping[str, str] | None = None
    ) -> None:
        self.definition = definition
        self.eot_id = eot_id
        self.companions = dict(companions or {})
        try:
            self._tokenizer = Definition.from_str(definition)
        except Exception as error:  # the library raises no narrower kind
            raise ValueError(str(error)) from error
        self._tokenizer.no_truncation()  # some files hold the settings of their training
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # written-out ones are plain text
        decoders = _decoders(json.loads(definition).get("decoder"))
        token_bytes = _token_bytes(self._tokenizer, decoders)
        if not 0 <= eot_id < len(token_bytes):
            raise ValueError(f"its end-of-text token {eot_id} is not one of {len(token_bytes)} ids")
        token_bytes[eot_id] = b""
        self.token_bytes = token_bytes
        self._strips_a_space = any(map(_strips_a_space, decoders))

    @classmethod
    def train(cls, config: HuggingFaceTokenizerConfig, texts: Iterable[str]) -> Self:
        """ConfigError: such a tokenizer comes with weights and is not learned."""
        raise ConfigError(
            "tokenizer.type hf is the tokenizer of pretrained weights and comes with them: set "
            "training.init_from=hf:PATH_OR_NAME, or choose tokenizer.type bpe or byte."
        )

    def _identity(self) -> str:
        return f"hf {self.eot_id}\n{self.definition}"

    def _files(self) -> dict[str, str]:
        return {TOKENIZER_FILE: self.definition, **self.companions}

    def encode(self, text: str) -> list[int]:
        encoding = self._tokenizer.encode(replace_surrogates(text), add_special_tokens=False)
        return list(encoding.ids)

    def encode_batch(self, texts: Sequence[str]) -> list[TokenArray]:
        """Token ids of each text, ``uint32``, on the library's own threads."""
        plain = [replace_surrogates(text) for text in texts]
        encodings = self._tokenizer.encode_batch_fast(plain, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``, without the space that some tokenizers put before every text.

        It is the text that was encoded, but for what the tokenizer's own normalizer changed.
        """
        text = super().decode(ids)
        return text.removeprefix(" ") if self._strips_a_space else text

    def token_id(self, token: str) -> int | None:
        """The id of a token by its name; None where there is none."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    @classmethod
    def load(cls, folder: Path, meta: dict[str, Any]) -> Self:
        try:
            return cls(_read(folder / TOKENIZER_FILE), int(meta["eot_id"]), read_companions(folder))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise damaged(folder / TOKENIZER_FILE, str(error) or repr(error)) from error


def read_companions(folder: Path) -> dict[str, str]:
    """The texts of the files beside a ``tokenizer.json`` that are kept with it, by name."""
    return {name: _read(folder / name) for name in COMPANION_FILES if (folder / name).is_file()}


def _read(path: Path) -> str:
    with path.open(encoding="utf-8", newline="") as file:  # line breaks are part of a template
        return file.read()


def _decoders(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The steps of a definition's decoder."""
    if decoder is None:
        return []
    if decoder.get("type") == "Sequence":
        return [step for inner in decoder["decoders"] for step in _decoders(inner)]
    return [decoder]


def _strips_a_space(decoder: Mapping[str, Any]) -> bool:
    if decoder["type"] == "Strip":
        return decoder.get("content") == " " and bool(decoder.get("start"))
    is_metaspace = bool(decoder["type"] == "Metaspace")
    return is_metaspace and decoder.get("prepend_scheme", "always") != "never"


def _token_bytes(tokenizer: Definition, decoders: Sequence[Mapping[str, Any]]) -> list[bytes]:
    """The bytes of each id."""
    kinds = {decoder["type"] for decoder in decoders}
    if "ByteLevel" in kinds:
        to_bytes = _of_byte_names
    elif kinds & {"ByteFallback", "Metaspace"}:
        to_bytes = _of_sentence_piece
    else:
        raise ValueError(
            f"its decoder ({', '.join(sorted(kinds)) or 'none'}) is not one of bytes (ByteLevel, "
            f"ByteFallback, Metaspace)"
        )
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    found = [UNKNOWN_BYTES] * (max(vocabulary.values(), default=-1) + 1)
    for name, token in vocabulary.items():
        found[token] = to_bytes(name)
    for token, added in tokenizer.get_added_tokens_decoder().items():
        found[token] = b"" if added.special else added.content.encode()
    return found


def _of_byte_names(name: str) -> bytes:
    if all(char in BYTE_OF_NAME for char in name):
        return bytes(BYTE_OF_NAME[char] for char in name)
    return name.encode()


def _of_sentence_piece(name: str) -> bytes:
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        return bytes.fromhex(name[3:5])
    return name.replace(_SPACE, " ").encode()
