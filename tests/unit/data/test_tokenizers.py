from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers as hf
from hypothesis import given
from hypothesis import strategies as st

from ultrathink.config.tokenizer import BpeTokenizerConfig, ByteTokenizerConfig
from ultrathink.core.errors import CheckpointError, DataError
from ultrathink.data.documents import replace_surrogates
from ultrathink.data.tokenizers import bpe as bpe_module
from ultrathink.data.tokenizers.base import (
    END_OF_TEXT,
    META_FILE,
    Tokenizer,
    behavior_hash,
    load_tokenizer,
)
from ultrathink.data.tokenizers.bpe import AWKWARD_TEXTS, BpeTokenizer
from ultrathink.data.tokenizers.byte import ByteTokenizer
from ultrathink.data.tokenizers.patterns import PATTERNS

# Any code point, and the mixtures in which splitting goes wrong.
ANY_TEXT = st.one_of(
    st.text(),
    st.text(alphabet=" \t\r\n\x0b\x0c\x1c\x85\u00a0\u2028\u3000ab1_.'\u00e9\u4e00"),
    st.text(alphabet="abcdefs 'STREVMDLL0123456789=({[:\n"),
    st.lists(st.sampled_from(AWKWARD_TEXTS)).map("".join),
)


def ids_of_hugging_face(folder: Path) -> Callable[[str], list[int]]:
    """An encoder that shares only the saved file with ours."""
    tokenizer = hf.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    return encode


@pytest.fixture(scope="session")
def saved(bpe: BpeTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    bpe.save(folder)
    return folder


# -- round trips --------------------------------------------------------------------------------


@given(text=st.one_of(ANY_TEXT, st.text(st.characters(codec=None))), payload=st.binary())
def test_text_and_bytes_come_back(bpe: BpeTokenizer, text: str, payload: bytes) -> None:
    for tokenizer in (bpe, ByteTokenizer()):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == replace_surrogates(text)
        assert tokenizer.decode_bytes(ids) == replace_surrogates(text).encode()
        assert all(0 <= i < tokenizer.vocab_size and i != tokenizer.eot_id for i in ids)
        first, second = tokenizer.encode_batch([text, "x"])
        assert (first.dtype, first.tolist()) == (np.uint32, ids)
        assert second.tolist() == tokenizer.encode("x")
        assert tokenizer.encode_batch([]) == []
    assert tokenizer.decode_bytes(list(payload)) == payload
    assert tokenizer.decode(payload) == payload.decode(errors="replace")


# -- what ids mean ------------------------------------------------------------------------------


@given(text=ANY_TEXT)
def test_ids_are_those_of_hugging_face(bpe: BpeTokenizer, saved: Path, text: str) -> None:
    assert bpe.engine == "tiktoken"
    assert bpe.encode(text) == ids_of_hugging_face(saved)(text)


@pytest.mark.parametrize("pattern", ["gpt4", "code", "gpt2"])
def test_ids_are_those_of_hugging_face_on_real_text(
    pattern: str, stdlib_texts: list[str], tmp_path: Path, public_file: Callable[[str], Path]
) -> None:
    config = BpeTokenizerConfig.model_validate({"vocab_size": 3000, "pattern": pattern})
    tokenizer = BpeTokenizer.train(config, stdlib_texts)
    tokenizer.save(tmp_path)
    assert tokenizer.engine == "tiktoken"
    encode = ids_of_hugging_face(tmp_path)
    novel = public_file("text/japanese-novel.txt").read_text(encoding="utf-8")
    samples = [*stdlib_texts[:20], *AWKWARD_TEXTS, novel]
    for text, ids in zip(samples, tokenizer.encode_batch(samples), strict=True):
        assert ids.tolist() == encode(text)
        assert tokenizer.decode_bytes(ids) == text.encode()
    if pattern == "code":  # a line break and an indentation are one token
        assert len(tokenizer.encode(":\n        ")) == 1


def test_a_disagreement_is_noticed_and_the_standard_library_of_both_is_used(
    stdlib_texts: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fast = BpeTokenizer._tiktoken.func

    def other_pattern(self: BpeTokenizer) -> object:
        self._pattern = r"\S+|\s+"
        return fast(self)

    monkeypatch.setattr(BpeTokenizer, "_tiktoken", property(other_pattern))
    tokenizer = BpeTokenizer.train(BpeTokenizerConfig(vocab_size=500), stdlib_texts[:3])
    assert tokenizer.engine == "tokenizers"
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert isinstance(again, BpeTokenizer)
    assert again.engine == "tokenizers"
    text = f"special {END_OF_TEXT} 🤖\n\n  x"
    assert again.decode(again.encode(text)) == text
    assert again.eot_id not in again.encode(text)
    assert again.encode_batch([text, ""])[0].tolist() == again.encode(text)
    assert again.encode("\ud800") == again.encode("\ufffd")


def test_special_tokens_surrogates_and_unknown_ids(bpe: BpeTokenizer) -> None:
    for tokenizer in (bpe, ByteTokenizer()):
        text = f"before {END_OF_TEXT} after"
        ids = tokenizer.encode(text)
        assert tokenizer.eot_id not in ids
        assert tokenizer.eot_id not in tokenizer.encode_batch([text])[0]
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([tokenizer.eot_id]) == ""
        assert tokenizer.decode(tokenizer.encode("a\ud800b\udfff")) == "a\ufffdb\ufffd"
        beyond = [tokenizer.vocab_size, *tokenizer.encode("a"), -1]
        assert tokenizer.decode(beyond) == "\ufffda\ufffd"


@pytest.mark.parametrize("text", [" " * 2_000_000 + "x", "a" * 200_000, "\n \t" * 400_000])
def test_long_runs_neither_crash_nor_stall(bpe: BpeTokenizer, text: str) -> None:
    assert bpe.decode_bytes(bpe.encode(text)) == text.encode()


# -- training -----------------------------------------------------------------------------------


def test_training_depends_on_content_only(stdlib_texts: list[str], tmp_path: Path) -> None:
    config = BpeTokenizerConfig(vocab_size=600)
    first = BpeTokenizer.train(config, stdlib_texts[:8])
    assert first.fingerprint == BpeTokenizer.train(config, iter(stdlib_texts[:8])).fingerprint
    assert first.fingerprint != BpeTokenizer.train(config, stdlib_texts[8:16]).fingerprint
    # Pinned: another Python or machine must find the same, and the probes must not change.
    assert behavior_hash(ByteTokenizer())[:16] == "329fed1f6fcd6c92" != behavior_hash(first)[:16]
    # Another process has another hash seed and other threads.
    script = (
        "import json, sys\n"
        "from ultrathink.config.tokenizer import BpeTokenizerConfig\n"
        "from ultrathink.data.tokenizers.base import behavior_hash\n"
        "from ultrathink.data.tokenizers.bpe import BpeTokenizer\n"
        "texts = json.load(sys.stdin)\n"
        "tokenizer = BpeTokenizer.train(BpeTokenizerConfig(vocab_size=600), texts)\n"
        "print(tokenizer.fingerprint, behavior_hash(tokenizer))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(stdlib_texts[:8]),
        text=True,
        capture_output=True,
        check=True,
        env={**os.environ, "RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7"},
    )
    assert result.stdout.split() == [first.fingerprint, behavior_hash(first)]


def test_vocab_size_is_the_real_number_of_ids(stdlib_texts: list[str]) -> None:
    full = BpeTokenizer.train(BpeTokenizerConfig(vocab_size=600), stdlib_texts[:8])
    assert full.vocab_size == 600
    small = BpeTokenizer.train(BpeTokenizerConfig(vocab_size=600), ["abc abc"])
    assert 257 < small.vocab_size < 270
    least = BpeTokenizer.train(BpeTokenizerConfig(vocab_size=257), stdlib_texts[:2])
    assert least.vocab_size == 257
    assert ByteTokenizer.train(ByteTokenizerConfig(), []).vocab_size == 257
    assert ByteTokenizerConfig().size() == 257
    with pytest.raises(DataError, match="no text to learn from"):
        BpeTokenizer.train(BpeTokenizerConfig(), ["", ""])


def test_only_train_bytes_are_read(stdlib_texts: list[str]) -> None:
    config = BpeTokenizerConfig(vocab_size=400, train_bytes=10_000)
    texts = iter(stdlib_texts)
    limited = BpeTokenizer.train(config, texts)
    num_read = len(stdlib_texts) - len(list(texts))
    assert num_read < 4
    *whole, last = stdlib_texts[:num_read]
    rest = last.encode()[: 10_000 - len("".join(whole).encode())].decode(errors="ignore")
    assert limited.fingerprint == BpeTokenizer.train(config, [*whole, rest]).fingerprint


# -- what the code makes of text ----------------------------------------------------------------


def test_code_that_does_other_things_has_another_behavior(
    bpe: BpeTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_specials(text: str) -> list[int]:
        return bpe._tiktoken.encode(replace_surrogates(text), allowed_special="all")

    changes: list[tuple[str, Any]] = [
        ("_pattern", PATTERNS["gpt2"]),
        ("token_bytes", bpe.token_bytes[::-1]),
        ("encode", with_specials),
    ]
    hashes = {behavior_hash(bpe), behavior_hash(BpeTokenizer(bpe.definition, bpe.engine))}
    assert len(hashes) == 1
    for name, value in changes:
        other = BpeTokenizer(bpe.definition, bpe.engine)
        setattr(other, name, value)
        assert other.fingerprint == bpe.fingerprint  # what was learned is the same
        hashes.add(behavior_hash(other))
    monkeypatch.setattr(bpe_module, "replace_surrogates", lambda text: replace_surrogates(text)[:9])
    assert len(hashes | {behavior_hash(BpeTokenizer(bpe.definition, bpe.engine))}) == 5


# -- saving -------------------------------------------------------------------------------------


def test_a_saved_tokenizer_is_the_same(bpe: BpeTokenizer, tmp_path: Path) -> None:
    for name, tokenizer in (("bpe", bpe), ("byte", ByteTokenizer())):
        tokenizer.save(tmp_path / name)
        tokenizer.save(tmp_path / name)  # over itself
        again: Tokenizer = load_tokenizer(tmp_path / name)
        assert type(again) is type(tokenizer)
        assert again.fingerprint == tokenizer.fingerprint
        assert (again.vocab_size, again.eot_id) == (tokenizer.vocab_size, tokenizer.eot_id)
        for text in AWKWARD_TEXTS:
            assert again.encode(text) == tokenizer.encode(text)
    assert bpe.fingerprint != ByteTokenizer().fingerprint


def test_damage_is_distinguished_from_absence(bpe: BpeTokenizer, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no tokenizer of ultrathink"):
        load_tokenizer(tmp_path / "nowhere")
    bpe.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = file.read_text(encoding="utf-8")
    meta = json.loads((tmp_path / META_FILE).read_text())
    other = content.replace('"ignore_merges": true', '"ignore_merges": false')
    for path, damaged, words in (
        (file, content[: len(content) // 2], "tokenizer is damaged"),
        (file, other, "not the ones that were saved together"),
        (file, None, "copy the whole tokenizer folder"),
        (tmp_path / META_FILE, json.dumps({**meta, "type": "bqe"}), r"type 'bqe', .* Known: bpe,"),
        (tmp_path / META_FILE, "{", "damaged"),
    ):
        path.unlink() if damaged is None else path.write_text(damaged, encoding="utf-8")
        with pytest.raises(CheckpointError, match=words):
            load_tokenizer(tmp_path)
