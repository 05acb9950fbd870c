from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import pickle
import sqlite3
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from itertools import compress, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ultrathink.config.data import (
    DummySourceConfig,
    JsonlSourceConfig,
    StdlibSourceConfig,
    TextSourceConfig,
)
from ultrathink.core.errors import DataError
from ultrathink.data.sources.dummy import DummySource
from ultrathink.data.sources.jsonl import JsonlSource
from ultrathink.data.sources.stdlib import StdlibSource
from ultrathink.data.sources.text import TextSource

SharedFile = Callable[[str], Path]


def texts(source: Any, split: str) -> list[str]:
    return [document.text for document in source.documents(split)]


def text_source(path: Path | str, **options: Any) -> TextSource:
    return TextSource(TextSourceConfig(path=str(path), **options))


def jsonl_source(path: Path | str, **options: Any) -> JsonlSource:
    return JsonlSource(JsonlSourceConfig(path=str(path), **options))


# -- stdlib -------------------------------------------------------------------------------------


def test_stdlib_follows_the_rule_recomputed_from_its_words() -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = ("site-packages", "dist-packages", "test", "tests", "idle_test", "encodings")
    expected: dict[str, str] = {}
    for path in root.glob("**/*.py"):
        relative = path.relative_to(root)
        if any(part in left_out for part in relative.parts[:-1]):
            continue
        try:
            expected[relative.as_posix()] = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
    held_out = {
        name for name in expected if int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20 == 0
    }
    source = StdlibSource(StdlibSourceConfig())
    val = {document.id: document.text for document in source.documents("val")}
    train = {document.id: document.text for document in source.documents("train")}
    assert set(val) == held_out
    assert len(held_out) > 10
    assert set(train) == set(expected) - held_out
    assert {**train, **val} == expected
    assert list(train) == sorted(train)
    assert source.expected_bytes("all") == sum(len(text.encode()) for text in expected.values())


def test_stdlib_skips_what_cannot_be_decoded_and_the_folders_of_the_rule(tmp_path: Path) -> None:
    names = "a.py b/c.py b/test/d.py site-packages/e.py encodings/f.py tests.py g.txt"
    for name in names.split():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9")
    source = StdlibSource(StdlibSourceConfig(), root=tmp_path)
    assert [document.id for document in source.documents("all")] == ["a.py", "b/c.py", "tests.py"]


def test_fingerprint_follows_content_and_names_not_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prints = []
    for folder, content in (("one", "x = 1"), ("two", "x = 1"), ("three", "x = 2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text(content)
        (tmp_path / folder / "z.py").write_text("z = 3")
        prints.append(StdlibSource(StdlibSourceConfig(), tmp_path / folder).fingerprint("all"))
        walk = os.walk  # the next folder is listed the other way round
        monkeypatch.setattr(
            os, "walk", lambda at, walk=walk: ((*found, files[::-1]) for *found, files in walk(at))
        )
    (tmp_path / "two" / "a.py").rename(tmp_path / "two" / "b.py")
    renamed = StdlibSource(StdlibSourceConfig(), tmp_path / "two").fingerprint("all")
    assert prints[0] == prints[1]
    assert len({prints[0], prints[2], renamed}) == 3


# -- text ---------------------------------------------------------------------------------------


def test_text_reads_files_folders_and_patterns_each_file_once(tmp_path: Path) -> None:
    for name in ("a.txt", "sub/b.txt", "sub/c.md", ".hidden/d.txt", "sub/.e.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\rc\n")  # line ends stay, the mark goes
    (tmp_path / "image.bin").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    first = "a\r\nb\rc\n"
    assert texts(text_source(tmp_path), "all") == [first, "sub/b.txt", "sub/c.md"]
    assert texts(text_source(tmp_path / "sub" / "*.md"), "all") == ["sub/c.md"]
    assert texts(text_source(tmp_path / "**" / "*.txt"), "all") == [first, "sub/b.txt"]
    assert texts(text_source(tmp_path / "link.txt"), "all") == [first]
    several = TextSource(
        TextSourceConfig(path=(str(tmp_path / "sub" / "b.txt"), str(tmp_path), str(tmp_path)))
    )
    assert texts(several, "all") == ["sub/b.txt", first, "sub/c.md"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "b.txt").write_text("of the same name")
    two = TextSource(TextSourceConfig(path=(str(tmp_path / "sub"), str(tmp_path / "other"))))
    assert [document.id for document in two.documents("all")] == ["b.txt", "c.md", "b.txt#2"]


def kinds_of_files(folder: Path) -> dict[str, tuple[bytes, str]]:
    """Files that are no text: their content, and words of the message."""
    text = b"All happy families are alike.\n" * 40
    packed, archive = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("a.txt", text)
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    base = sqlite3.connect(folder / "base.db")
    base.execute("create table a (b)")
    base.commit()
    weights = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    table = b"PAR1\x15\x04\x15\x06" + bytes(40) + b"PAR1"
    return {
        "a.zip": (packed.getvalue(), "is a zip archive, not text: unpack it first: unzip a.zip."),
        "a.tar": (archive.getvalue(), "is a tar archive, not text: unpack it first: tar -xf a.tar"),
        "a.bz2": (bz2.compress(text), "is compressed by bzip2, not text: decompress it first"),
        "a.xz": (lzma.compress(text), "is compressed by xz, not text: decompress it first: unxz"),
        "a.zst": (b"(\xb5/\xfd\x04X" + text, "is compressed by zstd, not text"),
        "a.parquet": (table, "is a Parquet table, not text: write its text column as JSON lines"),
        "a.db": ((folder / "base.db").read_bytes(), "is an SQLite database, not text"),
        "a.pdf": (b"%PDF-1.7\n" + text, "is a PDF, not text: extract its text: pdftotext a.pdf."),
        "a.png": (b"\x89PNG\r\n\x1a\n" + bytes(9), "is a PNG image, not text: name text files."),
        "a.jpg": (b"\xff\xd8\xff\xe0" + text, "is a JPEG image, not text"),
        "a.pkl": (pickle.dumps([text]), "is a pickle, not text"),
        "a.safetensors": (
            len(weights).to_bytes(8, "little") + weights + bytes(4),
            "is a safetensors file, weights of a model, not text: start from it with training.",
        ),
        "a.bin": (b"text\0\1\2", "is a binary file, not text"),
    }


def test_what_is_no_text_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    for name, (content, words) in kinds_of_files(tmp_path).items():
        path = tmp_path / name
        path.write_bytes(content)
        for source in (text_source(path), jsonl_source(path)):
            for read in (source.check, source.scan):
                with pytest.raises(DataError) as caught:
                    read()
                assert f"{path} {words}" in str(caught.value), (name, str(caught.value))
    (tmp_path / "b.txt").write_text("PK, BZh, PAR1 and %PDF are letters here.")
    assert texts(text_source(tmp_path), "all") == ["PK, BZh, PAR1 and %PDF are letters here."]


def test_gzip_is_read_as_what_it_holds(tmp_path: Path, public_file: SharedFile) -> None:
    text = "".join(f"Line {number}, né.\n" for number in range(9000))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    lines = "".join(json.dumps({"text": f"page {number}"}) + "\n" for number in range(9000))
    halves = [gzip.compress(part.encode()) for part in (lines[:50_000], lines[50_000:])]
    (tmp_path / "b.jsonl.gz").write_bytes(b"".join(halves))
    text_file, line_file = text_source(tmp_path / "a.txt.gz"), jsonl_source(tmp_path)
    for source in (text_file, line_file):
        source.check()
    assert texts(text_file, "all") == [text]
    assert texts(line_file, "all") == [f"page {number}" for number in range(9000)]
    for source, name in ((text_file, "a.txt.gz"), (line_file, "b.jsonl.gz")):
        entries = source._entries or {}
        assert entries[name].sha256 == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:-9])
        with pytest.raises(DataError, match=rf"{name}: cannot be read"):
            source.scan()
    path = public_file("cases/text.gz")
    text_source(path).check()
    assert texts(text_source(path), "all") == [gzip.decompress(path.read_bytes()).decode()]


def test_the_start_of_a_file_ends_with_a_line_or_a_character(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for shift in range(4):
        path.write_text("x" * shift + "\U0001f642" * 20_000)
        text_source(path).check()
    path.write_text('{"text": "' + "y" * 40_000 + '"}\n' + '{"text": "' + "z" * 40_000 + '"}\n')
    jsonl_source(path).check()
    path.write_text('{"text": "fine"}\n{"txt": 1}\n')
    with pytest.raises(DataError, match="line 2: there is no field 'text'"):
        jsonl_source(path).check()


def test_text_that_is_not_utf8_is_named_with_the_way_out_or_skipped(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("naïve".encode("latin-1"))
    with pytest.raises(DataError) as caught:
        texts(text_source(path), "all")
    assert str(caught.value) == (
        f"{path}: not UTF-8 at byte 2 (0xef). Convert it, for example with `iconv -f ISO-8859-1 "
        f"-t UTF-8`, or leave such files out with `on_bad: skip`."
    )
    (tmp_path / "a.txt").write_bytes("text".encode("utf-16"))  # not taken for binary
    with pytest.raises(DataError, match=r"not UTF-8 at byte 0 \(0xff\).*iconv -f UTF-16"):
        texts(text_source(tmp_path), "all")
    (tmp_path / "good.txt").write_text("good")
    source = text_source(tmp_path, on_bad="skip")
    for _ in range(2):
        assert texts(source, "all") == ["good"]
        assert source.num_skipped == 2


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nowhere.txt", "path 'nowhere.txt' does not exist"),
        ("*.nothing", "matches no file"),
        ("empty", "is a folder without files that this source can read"),
    ],
)
def test_text_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=words) as caught:
        text_source(path)
    assert path in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(
    texts_of_all=st.one_of(
        st.lists(st.text("ab \né😀", max_size=60), min_size=1, max_size=19),
        st.lists(st.text("ab \né😀", max_size=9), min_size=20, max_size=60),
    ),
    fraction=st.sampled_from([0, 0.05, 0.2, 0.5]),
)
def test_what_is_held_out_follows_the_rule(texts_of_all: list[str], fraction: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts_of_all))
        source = jsonl_source(path, val_fraction=fraction)
        assert texts(source, "all") == texts_of_all
        train, val = texts(source, "train"), texts(source, "val")
        other = jsonl_source(path, val_fraction=0.3)
        assert source.fingerprint("all") == other.fingerprint("all")
        assert source.fingerprint("train") != other.fingerprint("train")
    if fraction == 0:
        assert (train, val) == (texts_of_all, [])
    elif len(texts_of_all) < 20:  # the end of each
        cuts = [reference_cut(text, fraction) for text in texts_of_all]
        pairs = list(zip(texts_of_all, cuts, strict=True))
        assert train == [text[:cut] for text, cut in pairs if text[:cut]]
        assert val == [text[cut:] for text, cut in pairs if text[cut:]]
    else:  # whole ones, by their hashes
        hashes = [hashlib.sha256(text.encode()).digest()[:8].hex() for text in texts_of_all]
        limit = f"{int(fraction * 2**64):016x}"
        below = [value < limit for value in hashes]
        if len(set(hashes)) > 1:
            if not any(below):
                below = [value == min(hashes) for value in hashes]
            if all(below):
                below = [value < max(hashes) for value in hashes]
            assert train
            assert val
            assert val == list(compress(texts_of_all, below))
        assert not set(train) & set(val)  # copies stay together
        assert sorted(train + val) == sorted(texts_of_all)


def reference_cut(text: str, fraction: float) -> int:
    """From the last line break at most half of the held-out part before the cut, or the next."""
    size = max(1, round(len(text) * fraction))
    cut, slack = len(text) - size, size // 2
    breaks = [place + 1 for place, character in enumerate(text) if character == "\n"]
    before = [place for place in breaks if max(0, cut - slack) < place <= cut]
    after = [place for place in breaks if cut < place <= cut + slack]
    return (before[-1:] or after[:1] or [cut])[0]


# -- jsonl --------------------------------------------------------------------------------------


def test_jsonl_reads_one_string_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "one\\n", "id": 7}\r\n\n   \n{"text": "zw\xc3\xb6lf \xe2\x80\xa8"}\n'
        b'{"text": "lone \\ud800, pair \\ud83d\\ude00"}'
    )
    source = jsonl_source(path)
    assert texts(source, "all") == ["one\n", "zwölf \u2028", "lone \ufffd, pair 😀"]
    assert [d.id for d in source.documents("all")] == ["a.jsonl:1", "a.jsonl:4", "a.jsonl:5"]
    path.write_text('{"body": "a"}\n')
    (tmp_path / "b.json").write_text('{"body": "b"}\n')
    (tmp_path / "c.txt").write_text("no json")
    assert texts(jsonl_source(tmp_path, field="body"), "all") == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "cut', "not JSON (column 10: Unterminated string starting)."),
        (b'["text"]', "expected a JSON object, found an array."),
        (b"3", "expected a JSON object, found 3."),
        (b'{"txt": "a"}', "there is no field 'text' (keys: txt; did you mean `field: txt`?)."),
        (b"{}", "there is no field 'text' (keys: none)."),
        (b'{"text": null}', "field 'text' is null, not a string."),
        (b'{"text": ["a"]}', "field 'text' is an array, not a string."),
        (b'{"text": "\xff"}', "not UTF-8 at byte 10 of the line."),
    ],
)
def test_a_bad_line_is_named_or_skipped(tmp_path: Path, line: bytes, problem: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine too"}\n')
    with pytest.raises(DataError) as caught:
        texts(jsonl_source(path), "all")
    assert str(caught.value) == (
        f"{path}, line 3: {problem} Correct the line, or leave such lines out with `on_bad: skip`."
    )
    path.write_bytes(path.read_bytes() + b"[" * 100_000)  # nested beyond what Python reads
    source = jsonl_source(path, on_bad="skip")
    assert texts(source, "all") == ["fine", "fine too"]
    assert source.num_skipped == 2


@pytest.mark.parametrize(
    ("content", "kind", "command"),
    [
        ('[{"text": "a"},\n{"text": "b"}]', "array", "jq -c '.[]'"),
        ('[\n  {"text": "a"}\n]', "array", "jq -c '.[]'"),
        ('{\n  "text": "a"\n}', "object over several lines", "jq -c ."),
    ],
)
def test_one_json_value_in_a_file_of_lines_is_named(
    tmp_path: Path, content: str, kind: str, command: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        texts(jsonl_source(path), "all")
    assert str(caught.value) == (
        f"{path} is one JSON {kind}, not one object a line. Convert it: {command} a.jsonl > "
        f"lines.jsonl"
    )


# -- dummy --------------------------------------------------------------------------------------


def test_dummy_text_is_the_same_everywhere() -> None:
    source = DummySource(DummySourceConfig(num_documents=40, num_words=30))
    assert texts(source, "all") == texts(
        DummySource(DummySourceConfig(num_documents=40, num_words=30)), "all"
    )
    # Pinned: another Python or machine must generate the same text.
    assert source.fingerprint("all")[:16] == "841950c3f4de208e"
    other = DummySource(DummySourceConfig(num_documents=40, num_words=30, seed=1))
    assert not set(texts(source, "all")) & set(texts(other, "all"))


def test_dummy_text_has_structure_and_a_held_out_part() -> None:
    source = DummySource(DummySourceConfig(num_documents=200, num_words=120))
    words = " ".join(texts(source, "train")).replace(".", "").split()
    followers: dict[str, set[str]] = {}
    for first, second in pairwise(words):
        followers.setdefault(first, set()).add(second)
    assert len(followers) <= 64
    # Joined documents add a few chance neighbours.
    assert sum(len(found) for found in followers.values()) / len(followers) < 8
    assert 2 <= len(texts(source, "val")) <= 25
    assert len(texts(DummySource(DummySourceConfig(num_documents=2)), "val")) == 1
