"""Resuming a run whose text or token cache has changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.data.data_helpers import books_and_crawl, loader_of, planes, write_crawl
from ultrathink.config.data import DataConfig
from ultrathink.config.tokenizer import BpeTokenizerConfig
from ultrathink.core.errors import CheckpointError
from ultrathink.data.prepare import PreparedData, prepare_data
from ultrathink.data.record import DataRecord
from ultrathink.data.resume import ResumedData, check_data, resume_data
from ultrathink.data.tokenizers.bpe import BpeTokenizer
from ultrathink.data.tokenizers.byte import ByteTokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two books, and 30 lines of JSON."""
    (tmp_path / "text" / "books").mkdir(parents=True)
    for name in "ab":
        (tmp_path / "text" / "books" / f"{name}.txt").write_text(f"the text of {name}\n" * 400)
    write_crawl(tmp_path / "text", range(30))
    return tmp_path / "text"


@pytest.fixture
def before(folder: Path) -> PreparedData:
    """The data of the run, when it began."""
    with (folder / "crawl.jsonl").open("a") as file:
        file.write("not JSON\n")
    return prepare_data(books_and_crawl(folder), BpeTokenizerConfig(vocab_size=300))


def resume(before: PreparedData, config: DataConfig, **options: Any) -> ResumedData:
    """As a later process does it: the record comes from its file."""
    record = DataRecord.from_json(json.loads(json.dumps(before.record.to_json())))
    return resume_data(config.model_copy(update=options), before.tokenizer, record)


def refusal(before: PreparedData, config: DataConfig, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        resume(before, config, **options)
    return str(caught.value)


def samples(data: PreparedData) -> list[list[list[int]]]:
    loader = loader_of(data.train_stores, data.record.weights, seq_len=16)
    return [planes(loader.next_batch())[0].tolist() for _ in range(99)]


def assert_equal_data(here: PreparedData, before: PreparedData) -> None:
    """All that decides what comes is the same."""
    assert [store.folder for store in here.train_stores] == [
        store.folder for store in before.train_stores
    ]
    assert [store.tokens.tolist() for store in here.val_stores] == [
        store.tokens.tolist() for store in before.val_stores
    ]
    assert (here.num_samples, here.record) == (before.num_samples, before.record)
    assert samples(here) == samples(before)


# -- nothing changed ----------------------------------------------------------------------------


def copied(folder: Path) -> Path:
    """Other times and equal content."""
    for path in (*(folder / "books").iterdir(), folder / "crawl.jsonl"):
        copy = path.with_name("copy")
        copy.write_bytes(path.read_bytes())
        copy.replace(path)
    return folder


@pytest.mark.parametrize("on_change", ["refuse", "rebuild", "keep"])
@pytest.mark.parametrize(
    "change", [lambda folder: folder, lambda folder: folder.rename(f"{folder} moved"), copied]
)
def test_the_same_text_is_gone_on_with(
    folder: Path,
    before: PreparedData,
    on_change: str,
    change: Callable[[Path], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ultrathink.data.cache.build_store", lambda *_: pytest.fail("rebuilt"))
    found = resume(before, books_and_crawl(change(folder)), on_change=on_change)
    assert (found.action, found.changes, found.data.notes) == ("same", [], [])
    assert_equal_data(found.data, before)


# -- the text changed ---------------------------------------------------------------------------


def grow_and_remove(folder: Path) -> None:
    (folder / "books" / "b.txt").unlink()
    with (folder / "crawl.jsonl").open("a") as file:
        file.write('{"text": "more"}\n' * 310)


def test_held_out_text_that_changed_is_refused_too(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text("held out\n" * 50)
    val = [{"type": "text", "path": str(tmp_path / "held.txt")}]
    before = prepare_data(books_and_crawl(folder, val=val), ByteTokenizer())
    (tmp_path / "held.txt").write_text("held OUT\n" * 50)
    assert refusal(before, books_and_crawl(folder, val=val)).startswith(
        "the data changed since this run began: held.txt changed (still 450 bytes). Restore"
    )
    kept = resume(before, books_and_crawl(folder, val=val), on_change="keep")
    assert_equal_data(kept.data, before)


def test_a_change_is_refused_with_ways_out_and_rebuild_trains_on_it(
    folder: Path, before: PreparedData
) -> None:
    grow_and_remove(folder)
    assert refusal(before, books_and_crawl(folder)) == (
        "the data changed since this run began: books/b.txt is gone; crawl.jsonl grew by 310 "
        "documents. Restore the files, or resume with data.on_change=keep (use the tokens cached "
        "then), or resume with data.on_change=rebuild (train on the new text from here)."
    )
    found = resume(before, books_and_crawl(folder), on_change="rebuild")
    assert found.action == "rebuild"
    assert found.changes == ["books/b.txt is gone", "crawl.jsonl grew by 310 documents"]
    fresh = prepare_data(books_and_crawl(folder), before.tokenizer)
    assert_equal_data(found.data, fresh)
    assert found.data.record.data_hash != before.record.data_hash
    assert resume(found.data, books_and_crawl(folder)).action == "same"


@pytest.mark.parametrize(
    "lose",
    [
        grow_and_remove,
        shutil.rmtree,
        lambda folder: (folder / "crawl.jsonl").unlink(),
        lambda folder: (folder / "books" / "a.txt").write_bytes(b"\xff\xfe" * 100),
    ],
)
def test_keep_resumes_with_the_cached_tokens(
    folder: Path, before: PreparedData, lose: Callable[[Path], Any]
) -> None:
    lose(folder)
    found = resume(before, books_and_crawl(folder), on_change="keep")
    assert found.action == "keep"
    assert len(found.changes) >= 1
    assert found.data.notes == []
    assert_equal_data(found.data, before)


def test_vanished_sources_are_named_with_what_is_left_to_do(
    folder: Path, before: PreparedData
) -> None:
    path = folder / "books" / "a.txt"
    path.write_bytes(b"\xff" + path.read_bytes())
    assert refusal(before, books_and_crawl(folder)).startswith(
        f"the data changed since this run began: {path}: not UTF-8 at byte 0 (0xff). Restore the"
    )
    shutil.rmtree(folder / "books")
    write_crawl(folder, range(12))
    words = (
        f"the data changed since this run began: data source 'books': path "
        f"'{folder}/books' does not exist (looked from {Path.cwd()}); crawl.jsonl changed (30 "
        f"documents then, 12 now). Restore the files, or resume with "
        f"data.on_change=keep (use the tokens cached then)."
    )
    assert refusal(before, books_and_crawl(folder)) == words
    assert (
        "now). data.on_change=rebuild needs text that can be read. Restore the files"
    ) in refusal(before, books_and_crawl(folder), on_change="rebuild")


# -- the tokenizer ------------------------------------------------------------------------------


def test_another_tokenizer_is_refused_before_anything_is_read(
    folder: Path, before: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(folder)
    record = before.record
    with pytest.raises(CheckpointError, match="tokenizer is not the one that the run was trained"):
        resume_data(books_and_crawl(folder, on_change="keep"), ByteTokenizer(), record)
    tokenizer = before.tokenizer
    assert isinstance(tokenizer, BpeTokenizer)
    cut_otherwise = BpeTokenizer(tokenizer.definition, tokenizer.engine)
    cut_otherwise._pattern = r"\S|\s"  # what other code would do with the same files
    with pytest.raises(CheckpointError, match="this version of the code or its libraries"):
        resume_data(books_and_crawl(folder, on_change="keep"), cut_otherwise, record)


# -- the cache is damaged as well ---------------------------------------------------------------


def flip(path: Path) -> None:
    """Change one bit in the middle: the size stays."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(path: Path) -> None:
    shutil.rmtree(path.parent)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip, "is damaged (tokens.bin: other content than was written)"),
        (lambda path: path.write_bytes(path.read_bytes()[:-6]), "bytes instead of"),
        (remove, "is missing"),
    ],
)
def test_keep_needs_whole_stores(
    folder: Path, before: PreparedData, damage: Callable[[Path], Any], words: str
) -> None:
    store = before.train_stores[1]
    damage(store.folder / "tokens.bin")
    write_crawl(folder, range(12))
    text = refusal(before, books_and_crawl(folder), on_change="keep")
    assert refusal(before, books_and_crawl(folder), on_change="keep", verify="full") == text
    assert f"the store of crawl (train), {store.folder}, " in text
    assert words in text
    assert "cannot be rebuilt: crawl.jsonl changed (30 documents then, 12 now). Restore" in text
    assert "data.cache_dir, or resume with data.on_change=rebuild" in text


def test_keep_rebuilds_the_stores_of_a_source_that_is_unchanged(
    folder: Path, before: PreparedData
) -> None:
    damaged = before.train_stores[0]
    tokens = damaged.tokens.tolist()
    flip(damaged.folder / "tokens.bin")
    write_crawl(folder, range(12))
    found = resume(before, books_and_crawl(folder), on_change="keep")
    assert found.data.train_stores[0].tokens.tolist() == tokens
    assert found.data.notes == [
        "the token cache of books (train) was damaged (tokens.bin: other content than was "
        "written) and was rebuilt"
    ]
    assert resume(before, books_and_crawl(folder), on_change="keep").data.notes == []


def test_keep_after_the_whole_cache_is_lost_works_while_the_text_is_there(
    folder: Path, before: PreparedData, tmp_path: Path
) -> None:
    expected = samples(before)
    shutil.rmtree(tmp_path / "cache")
    found = resume(before, books_and_crawl(folder), on_change="keep")
    assert found.action == "same"
    assert samples(found.data) == expected
    shutil.rmtree(tmp_path / "cache")
    shutil.rmtree(folder)
    assert "is missing and cannot be rebuilt" in refusal(
        before, books_and_crawl(folder), on_change="keep"
    )


def test_a_check_hashes_text_and_stores_and_changes_nothing(
    folder: Path, before: PreparedData
) -> None:
    def check() -> dict[str, tuple[str, str]]:
        found = check_data(books_and_crawl(folder), before.tokenizer, before.record)
        return {item: (status, detail) for item, status, detail in found}

    sound = check()
    assert len(sound) == 5
    assert {status for status, _ in sound.values()} == {"ok"}
    books, crawl = before.train_stores
    flip(books.folder / "tokens.bin")
    shutil.rmtree(crawl.folder)
    grow_and_remove(folder)
    for _ in range(2):
        found = check()
        again = "the next start rebuilds it if the text is unchanged"
        assert found["tokens of books (train)"] == (
            "damaged",
            f"{books.folder}: tokens.bin: other content than was written; {again}",
        )
        assert found["tokens of crawl (train)"] == ("note", f"{crawl.folder} is missing; {again}")
        assert found["tokens of books (val)"][0] == "ok"
        assert found["text"] == ("note", "changed since: crawl.jsonl grew by 310 documents")
