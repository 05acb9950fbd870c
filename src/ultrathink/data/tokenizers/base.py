"""What every tokenizer offers, and how a saved one is read back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from ultrathink.config.tokenizer import TOKENIZERS
from ultrathink.core.errors import CheckpointError, suggestion
from ultrathink.core.files import write_atomic

TokenArray: TypeAlias = npt.NDArray[np.uint32]

END_OF_TEXT = "<|endoftext|>"
META_FILE = "tokenizer_meta.json"
# What stands for an id that the vocabulary lacks: a model's output may be wider than it.
UNKNOWN_BYTES = "\ufffd".encode()


class Tokenizer(Protocol):
    """Text to token ids and back.

    User text is plain text: a special token written out in it is encoded like any other
    characters. All text that UTF-8 can carry comes back exactly; lone surrogates come back as
    U+FFFD. The end-of-text token stands for no bytes.
    """

    @property
    def vocab_size(self) -> int:
        """How many ids there are, the end-of-text token included."""
        ...

    @property
    def eot_id(self) -> int:
        """The end-of-text token, which follows each document."""
        ...

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides the ids."""
        ...

    @classmethod
    def train(cls, config: Any, texts: Iterable[str]) -> Self:
        """Learn from ``texts``, given the options registered for this type."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, no special ones added."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[TokenArray]:
        """Token ids of each text, ``uint32``; the fast way for many."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD."""
        ...

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ``ids``; the end-of-text token has none."""
        ...

    def save(self, folder: Path) -> None:
        """Write all that ``load_tokenizer`` needs into ``folder``, which may exist."""
        ...

    @classmethod
    def load(cls, folder: Path, meta: dict[str, Any]) -> Self:
        """Read back what ``save`` wrote; ``meta`` is the content of its meta file."""
        ...


def join_bytes(ids: Iterable[int], pieces: Sequence[bytes]) -> bytes:
    """The bytes of ``ids``, given those of each id of the vocabulary."""
    size = len(pieces)
    return b"".join(pieces[i] if 0 <= i < size else UNKNOWN_BYTES for i in map(int, ids))


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Write the small file that says what kind of tokenizer a folder holds."""
    write_atomic(folder / META_FILE, json.dumps(meta, indent=2) + "\n")


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that was saved in ``folder``; CheckpointError where it is missing or damaged.

    Nothing but the files is read: no network, and no code named by them.
    """
    path = Path(folder) / META_FILE
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: there is no such file, so {folder} holds no tokenizer of ultrathink. Name "
            f"the run's own tokenizer folder, or train again."
        ) from None
    except ValueError as error:
        raise damaged(path, str(error)) from error
    if not isinstance(meta, dict) or not isinstance(meta.get("type"), str):
        raise damaged(path, "it names no type")
    if meta["type"] not in TOKENIZERS:
        raise CheckpointError(
            f"{path}: the tokenizer is of type {meta['type']!r}, which is not known here. "
            f"{suggestion(meta['type'], TOKENIZERS.names())} A type of your own is loaded with "
            f"--plugin FILE.py."
        )
    tokenizer: Tokenizer = TOKENIZERS.load(meta["type"]).load(Path(folder), meta)
    if tokenizer.fingerprint != meta.get("fingerprint"):
        raise damaged(path, "its files are not the ones that were saved together")
    return tokenizer


def damaged(path: Path, problem: str) -> CheckpointError:
    """The error for a file that is there but cannot be what was saved."""
    return CheckpointError(
        f"{path}: the tokenizer is damaged ({problem}). Copy the folder again from where it was "
        f"saved, or train again."
    )
