"""Files that somebody writes to while they are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ultrathink.config.data import JsonlSourceConfig, StdlibSourceConfig, TextSourceConfig
from ultrathink.core.errors import DataError
from ultrathink.data.cache import open_or_build
from ultrathink.data.sources.base import Source
from ultrathink.data.sources.jsonl import JsonlSource
from ultrathink.data.sources.stdlib import StdlibSource
from ultrathink.data.sources.text import TextSource
from ultrathink.data.tokenizers.byte import ByteTokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    books = tmp_path / "books"
    books.mkdir()
    for number in range(30):
        (books / f"{number:02}.py").write_text(f"x = {number}\n")
    for name in ("a", "b"):
        lines = [json.dumps({"text": f"{name} {number}"}) + "\n" for number in range(30)]
        (books / f"{name}.jsonl").write_text("".join(lines))
    return books


def text(folder: Path, **options: Any) -> Source:
    return TextSource(TextSourceConfig(path=str(folder / "*.py"), name="books", **options))


def few(folder: Path) -> Source:
    """So few documents that the end of each is held out."""
    return TextSource(TextSourceConfig(path=str(folder / "0?.py"), name="books"))


def jsonl(folder: Path) -> Source:
    return JsonlSource(JsonlSourceConfig(path=str(folder), name="books"))


def stdlib(folder: Path) -> Source:
    return StdlibSource(StdlibSourceConfig(), folder)


def edit(path: Path, change: Callable[[list[str]], list[str]]) -> None:
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))


MORE = '{"text": "more"}\n'


@pytest.mark.parametrize(
    ("make", "name", "change", "event"),
    [
        (text, "07.py", lambda lines: ["y = 7\n"], "books/07.py changed"),
        (few, "07.py", lambda lines: ["y = 7\n"], "books/07.py changed"),
        (stdlib, "07.py", lambda lines: ["y = 7\n"], "stdlib/07.py changed"),
        (jsonl, "a.jsonl", lambda lines: [*lines, MORE], "books/a.jsonl grew"),
        (jsonl, "b.jsonl", lambda lines: [*lines, MORE], "books/b.jsonl grew"),
        (jsonl, "b.jsonl", lambda lines: lines[:-1], "books/b.jsonl changed"),
        (jsonl, "b.jsonl", lambda lines: [MORE, *lines], "books/b.jsonl changed"),
    ],
)
def test_a_file_that_changed_since_it_was_hashed_is_named_and_makes_no_store(
    folder: Path,
    tmp_path: Path,
    make: Callable[[Path], Source],
    name: str,
    change: Callable[[list[str]], list[str]],
    event: str,
) -> None:
    source = make(folder)
    source.scan()
    edit(folder / name, change)
    for split in ("train", "val", "all"):
        with pytest.raises(DataError) as caught:
            open_or_build(source, split, ByteTokenizer(), tmp_path / "cache")
        assert str(caught.value) == (f"{event} while it was read; retry once nothing writes to it.")
        assert list((tmp_path / "cache" / "tokens").iterdir()) == []


def test_a_file_that_vanished_since_it_was_hashed_is_named(folder: Path) -> None:
    sources = [text(folder), stdlib(folder), text(folder, on_bad="skip")]
    for source in sources:
        source.scan()
    (folder / "07.py").unlink()
    words = [r"07.py: cannot be read \(No such file"] * 2 + [r"^books/07.py changed while it was"]
    for source, expected in zip(sources, words, strict=True):
        with pytest.raises(DataError, match=expected):
            list(source.documents("all"))
    lines = jsonl(folder)
    (folder / "b.jsonl").unlink()
    with pytest.raises(DataError, match=r"b.jsonl: cannot be read \(No such file or directory\)"):
        lines.scan()


def test_what_appeared_since_the_scan_waits_for_the_next(folder: Path) -> None:
    source = stdlib(folder)
    before = list(source.documents("all"))
    (folder / "03x.py").write_text("new")
    assert list(source.documents("all")) == before
    assert len(list(stdlib(folder).documents("all"))) == len(before) + 1
