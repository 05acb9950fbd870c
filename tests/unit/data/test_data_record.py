"""What a run's data was, and what is said of each way in which it can differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.data.data_helpers import books_and_crawl, write_crawl
from ultrathink.config.data import DataConfig
from ultrathink.core.errors import CheckpointError
from ultrathink.data import reading
from ultrathink.data.reading import read_sources, record_sources
from ultrathink.data.record import DataRecord, describe_changes
from ultrathink.data.tokenizers.byte import ByteTokenizer

Change = Callable[[Path], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of three books, and a file of 30 JSON lines."""
    books = tmp_path / "books"
    (books / "more").mkdir(parents=True)
    for name in ("a.txt", "b.txt", "more/c.txt"):
        (books / name).write_text(f"text of {name}\n" * 1000)
    write_crawl(tmp_path, range(30))
    return tmp_path


def record_of(config: DataConfig, earlier: DataRecord | None = None) -> DataRecord:
    return record_sources(config, read_sources(config), ByteTokenizer(), earlier)


# -- what is recorded ---------------------------------------------------------------------------


def test_a_record_names_sources_files_and_stores(folder: Path) -> None:
    record = record_of(books_and_crawl(folder))
    books, crawl = record.train
    assert (books.name, books.type, books.weight, books.num_documents) == ("books", "text", 3, 3)
    assert set(books.fingerprints) == set(books.stores) == {"train", "val"}
    assert books.files is not None
    assert list(books.files) == ["a.txt", "b.txt", "more/c.txt"]
    size = (folder / "books" / "a.txt").stat().st_size
    assert (books.files["a.txt"].num_documents, books.files["a.txt"].num_bytes) == (1, size)
    assert books.num_bytes == sum(file.num_bytes for file in books.files.values())
    assert crawl.files is not None
    assert [file.num_documents for file in crawl.files.values()] == [30]
    assert record.val is None
    text = {"type": "text", "path": str(folder / "books"), "val_fraction": 0}
    assert set(record_of(books_and_crawl(folder, train=[text])).train[0].stores) == {"train"}
    named = record_of(books_and_crawl(folder, train=[text], val=[{"type": "dummy"}]))
    assert named.val is not None
    assert [set(source.stores) for source in (*named.train, *named.val)] == [{"all"}, {"all"}]
    assert list(named.val[0].files or ()) == ["dummy"]


def test_too_many_files_leave_their_totals(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_FILES", 2)
    before = record_of(books_and_crawl(folder))
    assert before.train[0].files is None
    assert (before.train[0].num_documents, before.train[0].num_bytes) == (3, 47_000)
    (folder / "books" / "a.txt").write_text("short")
    assert describe_changes(before, record_of(books_and_crawl(folder), before)) == [
        "source 'books' has other text (still 3 documents; 47,000 bytes then, 33,005 now)"
    ]


def test_a_damaged_record_is_named(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    with pytest.raises(CheckpointError, match=r"data.json is missing: it records what the run was"):
        DataRecord.read(path)
    record_of(books_and_crawl(folder)).write(path)
    content = path.read_text()
    digit = content.index('"a.txt"') + 40
    other = "0" if content[digit] != "0" else "1"
    for damage in (content[:-100], "", "[]", content[:digit] + other + content[digit + 1 :]):
        path.write_text(damage)
        with pytest.raises(CheckpointError, match=r"data.json is damaged \(.+Restore it"):
            DataRecord.read(path)
    with pytest.raises(CheckpointError, match="mine is damaged"):
        DataRecord.from_json({"format": 1}, "mine")


# -- what differs -------------------------------------------------------------------------------


def appended(folder: Path) -> None:
    with (folder / "crawl.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')


def blank_line(folder: Path) -> None:
    """The same documents with other ids: by them the split and the order are not the same."""
    path = folder / "crawl.jsonl"
    path.write_text("\n" + path.read_text())


def many(folder: Path) -> None:
    for number in range(20):
        (folder / "books" / f"d{number:02}.txt").write_text("x")


@pytest.mark.parametrize("val", [None, [{"type": "dummy"}]])
@pytest.mark.parametrize(
    ("change", "lines"),
    [
        (lambda f: None, []),
        (
            lambda f: (f / "books/a.txt").write_text("new text\n" * 1444),
            ["books/a.txt changed (14,000 bytes then, 12,996 now)"],
        ),
        (
            lambda f: (f / "books/a.txt").write_text("TEXT of a.txt\n" * 1000),
            ["books/a.txt changed (still 14,000 bytes)"],
        ),
        (lambda f: (f / "books/b.txt").unlink(), ["books/b.txt is gone"]),
        (lambda f: (f / "books/d.txt").write_text("x"), ["books/d.txt is new"]),
        (
            lambda f: (f / "books/b.txt").rename(f / "books/z.txt"),
            ["books/b.txt is gone", "books/z.txt is new"],
        ),
        (appended, ["crawl.jsonl grew by 1 document"]),
        (lambda f: write_crawl(f, range(340)), ["crawl.jsonl grew by 310 documents"]),
        (lambda f: write_crawl(f, range(30), note="not text"), []),
        (lambda f: write_crawl(f, range(28)), ["crawl.jsonl changed (30 documents then, 28 now)"]),
        (
            lambda f: write_crawl(f, [0, 99, *range(2, 40)]),
            ["crawl.jsonl changed (30 documents then, 40 now)"],
        ),
        (
            lambda f: write_crawl(f, [0, 0, *range(1, 30)]),
            ["crawl.jsonl changed (30 documents then, 31 now)"],
        ),
        (blank_line, ["crawl.jsonl changed (still 30 documents)"]),
        (many, [*(f"books/d{number:02}.txt is new" for number in range(8)), "and 12 more"]),
    ],
)
def test_files_that_differ_are_named(
    folder: Path, change: Change, lines: list[str], val: Any
) -> None:
    config = books_and_crawl(folder, val=val)
    record_of(config).write(folder / "data.json")
    before = DataRecord.read(folder / "data.json")
    assert before == record_of(config)
    change(folder)
    now = record_of(config, before)
    assert describe_changes(before, now) == lines
    assert (now.fingerprints == before.fingerprints) == (lines == [])


def test_sources_that_differ_are_named(folder: Path) -> None:
    config = books_and_crawl(folder)
    before = record_of(config)

    def lines(**options: Any) -> list[str]:
        return describe_changes(before, record_of(books_and_crawl(folder, **options), before))

    books, crawl = (source.model_dump() for source in config.train)
    assert lines(train=[{**books, "weight": 1}, crawl]) == ["source 'books': weight 3 then, 1 now"]
    assert lines(train=[books]) == ["source 'crawl' of data.train is gone"]
    assert lines(train=[books, crawl, {"type": "dummy"}]) == ["source 'dummy' of data.train is new"]
    assert lines(train=[{**books, "val_fraction": 0.2}, crawl]) == [
        "source 'books': another part of its text is held out for validation"
    ]
    assert lines(train=[{"type": "dummy", "weight": 3}, crawl]) == [
        "source 'dummy': type text then, dummy now",
        "source 'dummy' has other text (3 documents then, 200 now; 47,000 bytes then, 214,839 now)",
    ]
    paths = [str(folder / "books" / name) for name in ("a.txt", "b.txt")]
    two = {"type": "text", "path": paths, "name": "two"}
    web = {"type": "jsonl", "path": str(folder / "craw*"), "name": "web"}  # of a single file
    before = record_of(books_and_crawl(folder, train=[two, web]))
    appended(folder)
    assert lines(train=[{**two, "path": paths[::-1]}, web]) == [
        "source 'two': its files come in another order",
        "web/crawl.jsonl grew by 1 document",
    ]
