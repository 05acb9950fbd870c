from __future__ import annotations

import json
import os
import pickle
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.data.data_helpers import store_of
from ultrathink.config.data import DummySourceConfig
from ultrathink.core.errors import DataError
from ultrathink.data.cache import (
    DamagedStoreError,
    TokenStore,
    build_store,
    cache_folder,
    open_or_build,
)
from ultrathink.data.checksums import sealed
from ultrathink.data.documents import Document
from ultrathink.data.sources.dummy import DummySource
from ultrathink.data.tokenizers.bpe import BpeTokenizer
from ultrathink.data.tokenizers.byte import ByteTokenizer

TEXTS = ["first document\n", "", "zweites: größer", "🙂"]


def dummy() -> DummySource:
    return DummySource(DummySourceConfig(num_documents=30, num_words=20))


def test_a_store_holds_the_documents_and_their_counts(bpe: BpeTokenizer, tmp_path: Path) -> None:
    for number, tokenizer in enumerate((bpe, ByteTokenizer())):
        store = store_of(tmp_path / str(number), TEXTS, tokenizer)
        expected = [[*tokenizer.encode(text), tokenizer.eot_id] for text in TEXTS]
        assert store.tokens.tolist() == list(chain(*expected))
        assert np.diff(store.offsets).tolist() == [len(ids) for ids in expected]
        assert store.offsets.dtype == np.int64
        assert store.num_tokens == len(store.tokens)
        assert store.num_documents == 4
        assert store.num_bytes == sum(len(text.encode()) for text in TEXTS)
        assert store.token_bytes[store.tokens].sum() == store.num_bytes
        assert store.tokens.dtype == np.uint16
        payload = pickle.dumps(store)  # holds no tokens
        assert len(payload) < 2000
        assert pickle.loads(payload).tokens.tolist() == store.tokens.tolist()
    store = store_of(tmp_path / "empty", [])
    assert (store.num_tokens, len(store.tokens), store.offsets.tolist()) == (0, 0, [0])


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    class Wide(ByteTokenizer):
        vocab_size = 2**16 + 1  # type: ignore[assignment]
        eot_id = 2**16  # type: ignore[assignment]

    store = store_of(tmp_path / "wide", TEXTS, Wide())
    assert store.tokens.dtype == np.uint32
    assert (store.tokens == 2**16).sum() == len(TEXTS)


def test_content_split_tokenizer_and_code_each_have_their_own_store(
    bpe: BpeTokenizer, tmp_path: Path
) -> None:
    other = DummySource(DummySourceConfig(num_documents=30, num_words=20, seed=1))
    other_code = BpeTokenizer(bpe.definition, bpe.engine)
    other_code._pattern = r"\S|\s"
    assert other_code.fingerprint == bpe.fingerprint
    folders = {
        open_or_build(source, split, tokenizer, tmp_path).folder
        for source in (dummy(), other)
        for split in ("train", "val")
        for tokenizer in (bpe, other_code, ByteTokenizer())
    }
    assert len(folders) == 12


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(["tokens.bin", "offsets.npy", "token_bytes.npy", "meta.json"]),
    damage=st.sampled_from(["cut", "gone", "longer", "one bit"]),
    place=st.floats(0, 1, exclude_max=True),
    verify=st.sampled_from(["stat", "full"]),
)
def test_damage_is_noticed_repaired_and_reported_once(
    name: str, damage: str, place: float, verify: Any
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cache, notes = Path(folder), list[str]()
        store = open_or_build(dummy(), "train", ByteTokenizer(), cache)
        tokens, path = store.tokens.tolist(), store.folder / name
        content = path.read_bytes()
        # A text without its last line break is whole: two bytes are cut at least.
        size, at = len(content), int((len(content) - 1) * place)
        problem = f"{name}: other content than was written"
        if damage == "cut":
            path.write_bytes(content[:at])
            problem = f"{name}: {at:,} bytes instead of {size:,}"
        elif damage == "gone":
            path.unlink()
            problem = f"{name} is missing"
        elif damage == "longer":
            path.write_bytes(content + b"xx")
            problem = f"{name}: {size + 2:,} bytes instead of {size:,}"
        else:
            path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        for _ in range(2):
            again = open_or_build(dummy(), "train", ByteTokenizer(), cache, None, notes, verify)
            assert again.tokens.tolist() == tokens
            assert name == "meta.json" or path.read_bytes() == content
            assert [entry.name for entry in (cache / "tokens").iterdir()] == [store.folder.name]
        [note] = notes
        assert note.startswith("the token cache of dummy (train) was damaged (")
        assert note.endswith(") and was rebuilt")
        assert problem in note or name == "meta.json"  # which says itself what it should be


def test_a_meta_file_that_was_edited_is_not_believed(tmp_path: Path) -> None:
    store = open_or_build(dummy(), "train", ByteTokenizer(), tmp_path)
    path = store.folder / "meta.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({**meta, "num_bytes": meta["num_bytes"] + 1}))
    with pytest.raises(DamagedStoreError, match=r"meta.json: other content than was written"):
        TokenStore(store.folder, "dummy")
    del meta["checksum"]
    path.write_text(json.dumps(sealed({**meta, "format": 1})))
    with pytest.raises(DamagedStoreError, match="format 1, this version reads 3"):
        TokenStore(store.folder, "dummy")


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        source = DummySource(DummySourceConfig(num_documents=300, num_words=200))
        with pytest.raises(DataError) as caught:
            open_or_build(source, "train", ByteTokenizer(), disk)
        assert f"the cache {disk} cannot be written ([Errno 28] No space left" in str(caught.value)
        assert "Make room, or name another folder with data.cache_dir or $ULTR" in str(caught.value)
        assert list((disk / "tokens").iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_build_that_dies_leaves_nothing_that_opens(tmp_path: Path) -> None:
    def failing() -> Iterator[Document]:
        yield Document("a", "x" * 3_000_000)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_store(tmp_path / "store", failing(), ByteTokenizer())
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_killed_builds_go_after_a_day(tmp_path: Path) -> None:
    for name in (".old.tmp", ".new.tmp", ".long.tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / ".long.tmp" / "tokens.bin").write_bytes(b"still growing")
    day_ago = time.time() - 25 * 3600
    for name in (".old.tmp", ".long.tmp"):
        os.utime(tmp_path / name, (day_ago, day_ago))
    build_store(tmp_path / "store", iter([Document("a", "x")]), ByteTokenizer())
    assert {entry.name for entry in tmp_path.iterdir()} == {".new.tmp", ".long.tmp", "store"}


def test_two_may_build_at_once(tmp_path: Path) -> None:
    def build(_: int) -> list[int]:
        source = DummySource(DummySourceConfig(num_documents=500, num_words=20))
        return open_or_build(source, "train", ByteTokenizer(), tmp_path).tokens.tolist()

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(build, range(2))
    assert first == second
    assert len(list((tmp_path / "tokens").iterdir())) == 1


def test_a_whole_store_built_meanwhile_by_another_is_kept(tmp_path: Path) -> None:
    def slow() -> Iterator[Document]:
        yield Document("a", "same")
        store_of(tmp_path / "store", ["same"])  # the other one finishes first
        created.append((tmp_path / "store").stat().st_ino)

    created: list[int] = []
    build_store(tmp_path / "store", slow(), ByteTokenizer())
    # Its folder stays: it may be open.
    assert (tmp_path / "store").stat().st_ino == created[0]
    assert [entry.name for entry in tmp_path.iterdir()] == ["store"]


def test_cache_folder_order_of_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ULTRATHINK_CACHE", "/from/variable")
    assert cache_folder("/from/config") == Path("/from/config")
    assert cache_folder(None) == Path("/from/variable")
    monkeypatch.delenv("ULTRATHINK_CACHE")
    assert cache_folder(None) == Path.home() / ".cache" / "ultrathink"
