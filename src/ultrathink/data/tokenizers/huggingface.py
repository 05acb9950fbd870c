"""A tokenizer that came with pretrained weights, as its ``tokenizer.json`` defines it.

Whatever special tokens a tokenizer has, text of users is plain text to it: written out in a
document they are cut like other characters, and stand for no bytes where a model writes them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from tokenizers import Tokenizer as Definition

from ultrathink.config.tokenizer import HuggingFaceTokenizerConfig
from ultrathink.core.errors import ConfigError
from ultrathink.core.files import write_atomic
from ultrathink.data.documents import replace_surrogates
from ultrathink.data.tokenizers.base import (
    UNKNOWN_BYTES,
    TokenArray,
    damaged,
    join_bytes,
    write_meta,
)
from ultrathink.data.tokenizers.byte_names import BYTE_OF_NAME

TOKENIZER_FILE = "tokenizer.json"
# What other programs want to know besides; kept as it came, for an export to give back.
COMPANION_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
_SPACE = "\u2581"  # what SentencePiece writes for a space


class HuggingFaceTokenizer:
    """The tokenizer of a ``tokenizer.json``; the ids it gives are those of ``transformers``.

    ``eot_id`` is the token that follows each document. ``companions`` are the texts of the files
    of COMPANION_FILES that came with it, by name. Raises ValueError where the definition cannot
    be read, or where what its tokens stand for cannot be told.
    """

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
        self._tokenizer.no_truncation()  # some files carry the settings of a training of old
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # written-out ones are plain text
        decoders = _decoders(json.loads(definition).get("decoder"))
        self._pieces = _pieces(self._tokenizer, decoders)
        self.vocab_size = len(self._pieces)
        if not 0 <= eot_id < self.vocab_size:
            raise ValueError(f"its end-of-text token {eot_id} is not one of {self.vocab_size} ids")
        self._pieces[eot_id] = b""
        self._strips_a_space = any(map(_strips_a_space, decoders))

    @classmethod
    def train(cls, config: HuggingFaceTokenizerConfig, texts: Iterable[str]) -> Self:
        """Raise ConfigError: such a tokenizer is not learned, it comes with weights."""
        raise ConfigError(
            "tokenizer.type hf is the tokenizer of pretrained weights and comes with them: set "
            "training.init_from=hf:PATH_OR_NAME, or choose tokenizer.type bpe or byte."
        )

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides the ids."""
        return hashlib.sha256(f"hf {self.eot_id}\n{self.definition}".encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, no special ones added."""
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
        text = self.decode_bytes(ids).decode(errors="replace")
        return text.removeprefix(" ") if self._strips_a_space else text

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ``ids`` amid a text; special tokens have none."""
        return join_bytes(ids, self._pieces)

    def token_id(self, token: str) -> int | None:
        """The id of a token by its name; None where there is none."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json``, its companions as they came, and the meta file."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in {TOKENIZER_FILE: self.definition, **self.companions}.items():
            write_atomic(folder / name, text)
        write_meta(folder, "hf", self)

    @classmethod
    def load(cls, folder: Path, meta: dict[str, Any]) -> Self:
        """Read back what ``save`` wrote; CheckpointError where it is missing or damaged."""
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


def _pieces(tokenizer: Definition, decoders: Sequence[Mapping[str, Any]]) -> list[bytes]:
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
    pieces = [UNKNOWN_BYTES] * (max(vocabulary.values(), default=-1) + 1)
    for name, token in vocabulary.items():
        pieces[token] = to_bytes(name)
    for token, added in tokenizer.get_added_tokens_decoder().items():
        pieces[token] = b"" if added.special else added.content.encode()
    return pieces


def _of_byte_names(name: str) -> bytes:
    if all(char in BYTE_OF_NAME for char in name):
        return bytes(BYTE_OF_NAME[char] for char in name)
    return name.encode()


def _of_sentence_piece(name: str) -> bytes:
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        return bytes.fromhex(name[3:5])
    return name.replace(_SPACE, " ").encode()
