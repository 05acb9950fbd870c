"""Only files that may have changed are read again, and none that did is missed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.data.data_helpers import store_of
from ultrathink.config.data import DataConfig, JsonlSourceConfig, TextSourceConfig
from ultrathink.config.tokenizer import ByteTokenizerConfig
from ultrathink.core.errors import DataError
from ultrathink.data.cache import DamagedStoreError, TokenStore
from ultrathink.data.checksums import sealed
from ultrathink.data.manifest import Stat, read_manifest, wait_for_tick, write_manifest
from ultrathink.data.prepare import prepare_data
from ultrathink.data.sources.base import Source
from ultrathink.data.sources.jsonl import JsonlSource
from ultrathink.data.sources.text import TextSource

NAMES = [f"{number}.jsonl" for number in range(4)]
HOUR_NS = 3600 * 10**9


@contextmanager
def reads() -> Iterator[set[str]]:
    """The names of the files that are opened meanwhile."""
    opened: set[str] = set()
    really_open = Path.open

    def spy(path: Path, *args: Any, **options: Any) -> Any:
        opened.add(path.name)
        return really_open(path, *args, **options)

    with patch.object(Path, "open", spy):
        yield opened


@contextmanager
def clock(shift_ns: int) -> Iterator[None]:
    """The clock of the computer, set forward or back."""
    really = time.time_ns
    with patch("time.time_ns", lambda: really() + shift_ns):
        yield


def later() -> Any:
    """Long after all files were written, so that their stat can be relied on."""
    return clock(HOUR_NS)


# -- what can happen to a file between two starts --------------------------------------------------


def write(path: Path, word: str, lines: int = 3) -> None:
    path.write_text("".join(f'{{"text": "{word} {number}"}}\n' for number in range(lines)))


def edit(path: Path) -> None:
    write(path, "another", lines=5)


def grow(path: Path) -> None:
    with path.open("a") as file:
        file.write('{"text": "more"}\n')


def equal(path: Path) -> None:
    path.write_bytes(path.read_bytes())


def touch(path: Path) -> None:
    os.utime(path, ns=(0, 0))


def hide(path: Path) -> None:
    """Other content of the same size, and the time put back: only the ctime shows it."""
    content, stat = path.read_bytes(), path.stat()
    path.write_bytes(content.swapcase())
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def swap(path: Path) -> None:
    """Another file of the same size and time in its place."""
    beside = path.with_suffix(".new")
    shutil.copy2(path, beside)
    hide(beside)
    os.replace(beside, path)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


EVENTS = [edit, grow, equal, touch, hide, swap, cut, Path.unlink]


def source_of(folder: Path) -> Source:
    return JsonlSource(JsonlSourceConfig(path=str(folder), on_bad="skip"))


def what_it_holds(source: Source) -> Any:
    prints = [source.fingerprint(split) for split in ("all", "train", "val")]
    return prints, source.files(), source.num_skipped, list(source.documents("all"))


@settings(max_examples=40, deadline=None)
@given(
    starts=st.lists(
        st.dictionaries(st.sampled_from(NAMES), st.sampled_from(EVENTS), max_size=3), max_size=3
    ),
    shift_ns=st.sampled_from([HOUR_NS, 0, -HOUR_NS]),
)
def test_a_start_reads_just_what_may_have_changed_and_finds_what_a_fresh_one_finds(
    starts: list[dict[str, Any]], shift_ns: int
) -> None:
    with tempfile.TemporaryDirectory() as place, clock(shift_ns):
        folder, manifests = Path(place) / "text", Path(place) / "manifests"
        folder.mkdir()
        for name in NAMES:
            write(folder / name, name)
        source_of(folder).scan(manifests)
        for events in [{}, *starts]:
            wait_for_tick(Path(place), map(Stat.of, folder.iterdir()))
            touched = set()
            for name, event in events.items():
                if (folder / name).exists():
                    event(folder / name)
                else:
                    write(folder / name, "new")  # it vanished at an earlier start
                touched.add(name)
            here = {path.name for path in folder.iterdir()}
            if not here:
                with pytest.raises(DataError, match="is a folder without files"):
                    source_of(folder)
                break
            known = source_of(folder)
            with reads() as opened:
                known.scan(manifests)
            # Changed less than two seconds ago, or in the future: a stat is not relied on.
            suspects = touched if shift_ns > 0 else here
            assert opened & here == suspects & here
            assert what_it_holds(known) == what_it_holds(source_of(folder))


def test_text_is_distinguished_from_binary_files_without_reading_them_again(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("some text")
    (tmp_path / "text" / "b.bin").write_bytes(b"\0" * 9)
    (tmp_path / "text" / "c.txt").write_bytes(b"\xff\xff")

    def scanned() -> TextSource:
        source = TextSource(TextSourceConfig(path=str(tmp_path / "text"), on_bad="skip"))
        source.scan(tmp_path / "manifests")
        return source

    with later():
        first = scanned()
        with reads() as opened:
            again = scanned()
    assert not opened & {"a.txt", "b.bin", "c.txt"}
    assert what_it_holds(again) == what_it_holds(first)
    assert (list(again.files()), again.num_skipped) == (["a.txt"], 1)


def test_only_a_full_check_finds_what_no_stat_tells(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", "word")
    with later():
        source_of(tmp_path / "*.jsonl").scan(tmp_path / "manifests")
        hide(tmp_path / "a.jsonl")
        [path] = (tmp_path / "manifests").iterdir()
        [(name, entry)] = read_manifest(path).items()
        # As if the disk had done it.
        write_manifest(path, {name: replace(entry, stat=Stat.of(tmp_path / "a.jsonl"))})
        trusting, full = source_of(tmp_path / "*.jsonl"), source_of(tmp_path / "*.jsonl")
        trusting.scan(tmp_path / "manifests")
        full.scan(tmp_path / "manifests", "full")
    assert trusting.files() == {name: entry.documents}
    assert full.files() == source_of(tmp_path / "*.jsonl").files() != trusting.files()


@pytest.mark.parametrize("damage", ["", "{}", "[1]", '{"checksum": 3}', "bit"])
def test_a_damaged_manifest_is_made_again(tmp_path: Path, damage: str) -> None:
    write(tmp_path / "a.jsonl", "word")
    with later():
        source_of(tmp_path / "*.jsonl").scan(tmp_path / "manifests")
        [path] = (tmp_path / "manifests").iterdir()
        content = path.read_text()
        digest = next(iter(read_manifest(path).values())).sha256
        other = "0" if digest[0] != "0" else "1"
        path.write_text(content.replace(digest, other + digest[1:]) if damage == "bit" else damage)
        source_of(tmp_path / "*.jsonl").scan(tmp_path / "manifests")
    assert path.read_text() == content


def test_a_second_start_reads_neither_text_nor_tokens(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", "word", lines=100)
    data = DataConfig.model_validate(
        {"train": [{"type": "jsonl", "path": str(tmp_path / "a.jsonl")}], "seq_len": 16}
    )
    with later():
        first = prepare_data(data, ByteTokenizerConfig())
        with reads() as opened:
            again = prepare_data(data, ByteTokenizerConfig())
        assert not opened & {"a.jsonl", "tokens.bin", "offsets.npy", "token_bytes.npy"}
        assert again.record == first.record
        with reads() as opened:
            prepare_data(data.model_copy(update={"verify": "full"}), ByteTokenizerConfig())
        assert opened > {"a.jsonl", "tokens.bin", "offsets.npy", "token_bytes.npy"}


# -- token stores ----------------------------------------------------------------------------------


def test_a_copied_store_is_hashed_once(tmp_path: Path) -> None:
    store = store_of(tmp_path / "store", ["some text", "more"])
    shutil.copytree(tmp_path / "store", tmp_path / "copy")
    with later():
        for expected in ({"tokens.bin", "offsets.npy", "token_bytes.npy"}, set()):
            with reads() as opened:
                copied = TokenStore(tmp_path / "copy", "copy")
            assert {name for name in opened if "meta" not in name} == expected
    assert copied.tokens.tolist() == store.tokens.tolist()


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.npy", "token_bytes.npy"])
def test_only_a_full_check_finds_bits_that_a_disk_changed(tmp_path: Path, name: str) -> None:
    store = store_of(tmp_path / "store", ["some text", "more"])
    content = bytearray((store.folder / name).read_bytes())
    content[-1] ^= 1
    (store.folder / name).write_bytes(content)
    path = store.folder / "meta.json"
    meta = json.loads(path.read_text())
    meta["files"][name][:4] = Stat.of(store.folder / name)  # no stat differs
    del meta["checksum"]
    path.write_text(json.dumps(sealed(meta)))
    TokenStore(store.folder, "store")
    with pytest.raises(DamagedStoreError, match=f"^{name}: other content than was written$"):
        TokenStore(store.folder, "store", "full")
