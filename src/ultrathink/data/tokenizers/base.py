"""The interface of tokenizers, and how a saved one is read back."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from ultrathink.config.tokenizer import TOKENIZERS
from ultrathink.core.errors import CheckpointError, suggestion
from ultrathink.core.files import write_atomic

TokenArray: TypeAlias = npt.NDArray[np.uint32]

END_OF_TEXT = "<|endoftext|>"
META_FILE = "tokenizer_meta.json"
# Stands for an id that the vocabulary lacks: a model's output may be wider.
UNKNOWN_BYTES = "\ufffd".encode()

# What ``behavior_hash`` encodes. Changing them changes the hash of every run's tokenizer.
_PROBES = (
    "",
    " ",
    "The quick brown fox can't jump over 3 lazy dogs; it's 12,345.67 metres away!",
    "def f(x):\n    if x == 0:\n\treturn {'a': [1, 2]}  # note\n\n\nclass A:\n    pass\n",
    "0 1 12 123 1234 12345 1234567890 0x1F 3.14e-10 \u00bd \u00b2 \u2167 \u0663\u0664",
    "a  b   c    d\t\te \n \n\n   \r\n\r\n  \u00a0\u3000\u2028x" + " " * 40 + "y" + "\n" * 9,
    "na\u00efve caf\u00e9, Stra\u00dfe, e\u0301, \u0395\u03bb\u03bb\u03b7\u03bd, \u0420\u0443",
    "\u4e2d\u6587\u5b57\u7b26 \u65e5\u672c\u8a9e\u306e \ud55c\uad6d\uc5b4 \u0939\u093f \u0627",
    "\U0001f642\U0001f44d\U0001f3fd \U0001f469\u200d\U0001f467 \u2764\ufe0f\ufeff\ufffd\U0010ffff",
    "\x00\x01\x1b[0m\x7f lone \ud800 surrogates \udfff",
    f"plain {END_OF_TEXT} text </s> [INST]",
    "I'LL we'Ve DON'T 's'S " + "=" * 70 + "a" * 70 + "the the the thethethe internationalization",
)


class DamagedTokenizerError(CheckpointError):
    """A tokenizer folder that cannot be used; ``problem`` says why in a few words."""

    def __init__(self, message: str, problem: str) -> None:
        super().__init__(message)
        self.problem = problem


class Tokenizer(ABC):
    """Text to token ids and back; every id stands for bytes.

    A special token written out in a text is encoded like other characters. All text that UTF-8 can
    encode is decoded exactly; lone surrogates become U+FFFD.
    """

    type: ClassVar[str]
    """The name it is registered by."""
    eot_id: int
    """The end-of-text token, which follows each document and stands for no bytes."""
    token_bytes: Sequence[bytes]
    """The bytes of each id."""

    @classmethod
    @abstractmethod
    def train(cls, config: Any, texts: Iterable[str]) -> Self:
        """Learn from ``texts``, given the options registered for this type."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, no special ones added."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[TokenArray]:
        """Token ids of each text, ``uint32``; the fast way for many."""

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, meta: dict[str, Any]) -> Self:
        """Read back what ``save`` wrote; ``meta`` is the content of its meta file."""

    @abstractmethod
    def _identity(self) -> str:
        """All that decides the ids."""

    def _files(self) -> dict[str, str]:
        """The texts of the files to save, by name."""
        return {}

    def _meta(self) -> dict[str, str]:
        """Further keys of the meta file."""
        return {}

    @property
    def vocab_size(self) -> int:
        """The number of ids, the end-of-text token included."""
        return len(self.token_bytes)

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides the ids."""
        return hashlib.sha256(self._identity().encode()).hexdigest()

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ``ids``; special tokens have none."""
        known, size = self.token_bytes, len(self.token_bytes)
        return b"".join(known[i] if 0 <= i < size else UNKNOWN_BYTES for i in map(int, ids))

    def save(self, folder: Path) -> None:
        """Write all that ``load_tokenizer`` needs into ``folder``, which may exist."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in self._files().items():
            write_atomic(folder / name, text)
        meta = {
            "type": self.type,
            "vocab_size": self.vocab_size,
            "eot_id": self.eot_id,
            **self._meta(),
            "fingerprint": self.fingerprint,
        }
        write_atomic(folder / META_FILE, json.dumps(meta, indent=2) + "\n")


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that was saved in ``folder``; CheckpointError where it is missing or damaged.

    Nothing but the files is read: no network, and no code named by them.
    """
    path = Path(folder) / META_FILE
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DamagedTokenizerError(
            f"{path}: there is no such file, so {folder} holds no tokenizer of ultrathink. Name "
            f"the run's own tokenizer folder, or train again.",
            f"{META_FILE} is missing",
        ) from None
    except (ValueError, OSError) as error:
        raise damaged(path, str(error)) from error
    if not isinstance(meta, dict) or not isinstance(meta.get("type"), str):
        raise damaged(path, "it names no type")
    if meta["type"] not in TOKENIZERS:
        raise DamagedTokenizerError(
            f"{path}: the tokenizer is of type {meta['type']!r}, which is not known here. "
            f"{suggestion(meta['type'], TOKENIZERS.names())} A type of your own is loaded with "
            f"--plugin FILE.py.",
            f"{META_FILE} names the unknown type {meta['type']!r}",
        )
    tokenizer: Tokenizer = TOKENIZERS.load(meta["type"]).load(Path(folder), meta)
    if tokenizer.fingerprint != meta.get("fingerprint"):
        raise damaged(path, "its files are not the ones that were saved together")
    return tokenizer


def damaged(path: Path, problem: str) -> DamagedTokenizerError:
    """The error for a file that is not what was saved."""
    return DamagedTokenizerError(
        f"{path}: the tokenizer is damaged ({problem}). Copy the folder again from where it was "
        f"saved, or train again.",
        f"{path.name}: {problem}",
    )


def behavior_hash(tokenizer: Tokenizer) -> str:
    """A SHA-256 of the ids of fixed texts, and of what they decode to.

    The fingerprint covers what was learned, this what the code makes of it: it changes where
    another version of the code or of a library splits text differently.
    """
    found: list[Any] = [tokenizer.vocab_size, tokenizer.eot_id]
    for text, batched in zip(_PROBES, tokenizer.encode_batch(_PROBES), strict=True):
        ids = tokenizer.encode(text)
        found += [ids, batched.tolist(), tokenizer.decode(ids), tokenizer.decode_bytes(ids).hex()]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()
