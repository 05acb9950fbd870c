"""Files that somebody writes to while they are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ultrathink.config.data import (
    DummySourceConfig,
    JsonlSourceConfig,
    StdlibSourceConfig,
    TextSourceConfig,
)
from ultrathink.core.errors import DataError
from ultrathink.data.cache import open_or_build
from ultrathink.data.sources.base import ScannedSource
from ultrathink.data.sources.dummy import DummySource
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
        lines = "".join(f'{{"text": "{name} {number}"}}\n' for number in range(30))
        (books / f"{name}.jsonl").write_text(lines)
    return books


def text(folder: Path, **options: Any) -> ScannedSource:
    return TextSource(TextSourceConfig(path=str(folder / "*.py"), name="books", **options))


def jsonl(folder: Path) -> ScannedSource:
    return JsonlSource(JsonlSourceConfig(path=str(folder), name="books"))


def stdlib(folder: Path) -> ScannedSource:
    return StdlibSource(StdlibSourceConfig(), folder)


def add_line(path: Path) -> None:
    with path.open("a") as file:
        file.write('{"text": "more"}\n')


def cut(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def insert(path: Path) -> None:
    path.write_text('{"text": "before all"}\n' + path.read_text())


@pytest.mark.parametrize(
    ("make", "meanwhile", "event"),
    [
        (text, lambda f: (f / "07.py").write_text("y = 7\n"), "books/07.py changed"),
        (jsonl, lambda f: add_line(f / "a.jsonl"), "books/a.jsonl grew"),
        (jsonl, lambda f: add_line(f / "b.jsonl"), "books/b.jsonl grew"),
        (jsonl, lambda f: cut(f / "a.jsonl"), "books/a.jsonl changed"),
        (jsonl, lambda f: cut(f / "b.jsonl"), "books/b.jsonl changed"),
        (jsonl, lambda f: insert(f / "b.jsonl"), "books/b.jsonl changed"),
        (stdlib, lambda f: (f / "03x.py").write_text("new"), "stdlib/03x.py appeared"),
        (stdlib, lambda f: (f / "99.py").write_text("new"), "stdlib/99.py appeared"),
        (stdlib, lambda f: (f / "03.py").unlink(), "stdlib/03.py changed"),
        (stdlib, lambda f: (f / "29.py").unlink(), "stdlib/29.py changed"),
    ],
)
@pytest.mark.parametrize("split", ["train", "val", "all"])
def test_a_file_that_changed_since_it_was_hashed_is_named(
    folder: Path,
    make: Callable[[Path], ScannedSource],
    meanwhile: Callable[[Path], Any],
    event: str,
    split: Any,
) -> None:
    source = make(folder)
    source.fingerprint(split)
    meanwhile(folder)
    with pytest.raises(DataError) as caught:
        list(source.documents(split))
    assert str(caught.value) == (
        f"{event} while it was read; start again once nothing writes to it."
    )


def test_a_file_that_vanished_since_it_was_hashed_is_named(folder: Path) -> None:
    path = folder / "07.py"
    for source in (text(folder), stdlib(folder)):
        source.fingerprint("all")
    strict, lenient = text(folder), text(folder, on_bad="skip")
    strict.fingerprint("all")
    lenient.fingerprint("all")
    path.unlink()
    with pytest.raises(DataError, match=r"07.py: cannot be read \(No such file or directory\)"):
        list(strict.documents("all"))
    with pytest.raises(DataError, match=r"^books/07.py changed while it was read"):
        list(lenient.documents("all"))
    lines = jsonl(folder)
    (folder / "b.jsonl").unlink()
    with pytest.raises(DataError, match=r"b.jsonl: cannot be read \(No such file or directory\)"):
        lines.fingerprint("all")


def test_documents_cut_for_validation_are_checked_too(tmp_path: Path) -> None:
    path = tmp_path / "play.txt"
    path.write_text("a line of the play\n" * 400)
    source = TextSource(TextSourceConfig(path=str(path)))
    source.fingerprint("train")
    path.write_text("a line of the play\n" * 400 + "one more\n")
    for split in ("train", "val"):
        with pytest.raises(DataError, match=r"^play.txt changed while it was read"):
            list(source.documents(split))


def test_what_was_read_before_the_change_makes_no_store(folder: Path, tmp_path: Path) -> None:
    source = jsonl(folder)
    source.fingerprint("train")
    add_line(folder / "b.jsonl")
    cache = tmp_path / "cache"
    with pytest.raises(DataError, match=r"^books/b.jsonl grew while it was read"):
        open_or_build(source, "train", ByteTokenizer(), cache)
    assert list((cache / "tokens").iterdir()) == []


def test_what_does_not_change_is_read_as_often_as_wanted(folder: Path) -> None:
    for source in (text(folder), jsonl(folder), DummySource(DummySourceConfig(num_documents=9))):
        once = [list(source.documents(split)) for split in ("train", "val", "all")]
        assert [list(source.documents(split)) for split in ("train", "val", "all")] == once
        assert sorted(document.id for document in (*once[0], *once[1])) == sorted(
            document.id for document in once[2]
        )
