"""Atomic writes: the old file or the new one, never half of one."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ultrathink.core.files import (
    clean_up,
    new_folder,
    remove_folder,
    replace_folder,
    temporary_folder,
    write_atomic,
)


def test_text_and_bytes_are_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, "naïve\n")
    assert path.read_bytes() == "naïve\n".encode()
    write_atomic(path, b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_crash_leaves_the_old_file_and_nothing_beside_it(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old")

    def crash(*args: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, step, crash)
    with pytest.raises(OSError, match="no space left"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_is_on_the_disk_before_it_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real_fsync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), real_fsync(fd))[1])
    monkeypatch.setattr(
        os, "replace", lambda a, b: (calls.append("replace"), real_replace(a, b))[1]
    )
    write_atomic(tmp_path / "file", "text")
    assert calls == ["fsync", "replace"]


def folder(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "file").write_text(content)
    return path


def test_a_folder_that_cannot_be_replaced_stays(tmp_path: Path) -> None:
    target = folder(tmp_path / "a", "old")
    with pytest.raises(FileNotFoundError):
        replace_folder(tmp_path / "not there", target)
    assert (target / "file").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_is_out_of_sight_before_its_files_are_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = folder(tmp_path / "a", "text")
    seen: list[bool] = []
    real = shutil.rmtree

    def rmtree(path: Path, ignore_errors: bool) -> None:
        seen.append(target.exists())
        real(path, ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    remove_folder(target)
    assert seen == [False]
    assert list(tmp_path.iterdir()) == []


# -- a writer that does not stop -------------------------------------------------------------------


@pytest.fixture
def keep_writing(tmp_path: Path) -> Iterator[Callable[[Path], None]]:
    """Starts a process that writes into a folder again and again, wherever that is moved to."""
    script = """
import os, sys
os.chdir(sys.argv[1])
number = 0
while os.path.exists(sys.argv[2]):
    number += 1
    try:
        os.makedirs(f"part-{number % 7}", exist_ok=True)
        open(f"part-{number % 7}/{number % 97}", "w").close()
        open(f"file-{number % 97}", "w").close()
    except OSError:
        pass
"""
    go = tmp_path / "go"
    go.touch()
    writers: list[subprocess.Popen[bytes]] = []

    def start(place: Path) -> None:
        writers.append(subprocess.Popen([sys.executable, "-c", script, str(place), str(go)]))
        while len(list(place.iterdir())) < 20:
            time.sleep(0.01)

    yield start
    go.unlink()
    for writer in writers:
        assert writer.wait(10) == 0


KeepWriting = Callable[[Path], None]


def test_cleaning_up_never_fails(tmp_path: Path, keep_writing: KeepWriting) -> None:
    for _ in range(5):
        with temporary_folder() as place:
            keep_writing(place)
    clean_up(tmp_path / "missing")


def test_a_folder_is_removed_and_replaced_while_it_is_written_to(
    tmp_path: Path, keep_writing: KeepWriting
) -> None:
    removed, replaced = folder(tmp_path / "a", "old"), folder(tmp_path / "b", "old")
    for place in (removed, replaced):
        keep_writing(place)
    remove_folder(removed)
    assert not removed.exists()
    for content in ("new", "newer"):  # the second finds what the first could not delete
        replace_folder(folder(tmp_path / "new", content), replaced)
        assert (replaced / "file").read_text() == content
    with new_folder(replaced) as filled:
        (filled / "file").write_text("newest")
    assert [path.name for path in replaced.iterdir()] == ["file"]
