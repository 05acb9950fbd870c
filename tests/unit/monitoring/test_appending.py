"""Appending while the file vanishes and the disk fills up, both for real."""

import os
import random
import shutil
import signal
from pathlib import Path

import pytest

from tests.unit.monitoring.disks import fill, small_disk
from ultrathink.monitoring.appending import ResilientAppender


def appender(path: Path, **options: object) -> ResilientAppender:
    return ResilientAppender(lambda: path, **options)  # type: ignore[arg-type]


def append(file: ResilientAppender, *entries: str) -> int:
    """Append lines; returns how many of the calls said that a line has to wait."""
    failures = 0
    for entry in entries:
        try:
            file.append(f"{entry}\n".encode())
        except OSError:
            failures += 1
    return failures


def texts(file: ResilientAppender) -> list[str]:
    return [text for text, _ in file.take_notes()]


# -- full disks -----------------------------------------------------------------------------------


def test_a_full_disk_tears_nothing_and_loses_nothing(tmp_path: Path) -> None:
    """Lines of any length, on a disk that is full, empty and full again."""
    rng = random.Random(0)
    lines = [f"{number} " + "x" * rng.randrange(700) for number in range(300)]
    with small_disk(tmp_path / "disk") as disk:
        path = disk / "log"
        file = appender(path)
        filler, failures = None, 0
        for number, line in enumerate(lines):
            if number % 60 == 30:
                filler = fill(disk)
            elif number % 60 == 59 and filler is not None:
                filler.unlink()
            failures += append(file, line)
            written = path.read_text().splitlines(keepends=True)
            assert written == [f"{line}\n" for line in lines[: len(written)]]  # never half of one
        assert failures > 20
        assert len(written) == len(lines)
        recovered = texts(file)
        assert len(recovered) == 5
        assert all(text.startswith(f"{path} now has the ") for text in recovered)


def test_only_the_last_entries_wait_and_the_loss_is_reported(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        filler = fill(disk)
        file = appender(disk / "log", max_waiting=3)
        assert append(file, *"abcd") == 4
        with pytest.raises(OSError, match=r"No space left on device: '.*/log'"):
            file.append(b"e\n")
        assert file.is_waiting
        filler.unlink()
        file.flush()
        assert (disk / "log").read_text() == "c\nd\ne\n"
        (note,) = texts(file)
        assert "now has the 3 entries that had to wait; 2 older ones are lost" in note


def test_what_is_given_up_at_the_end_is_counted(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        file = appender(disk / "log")
        fill(disk)
        append(file, "a", "b")
        with pytest.raises(OSError, match="No space left"):
            file.close()
        assert texts(file) == [f"{disk / 'log'} lacks 2 entries that could not be written"]
        file.close()  # nothing is left to fail


def test_an_entry_that_cannot_be_taken_back_is_not_continued(tmp_path: Path) -> None:
    """/dev/full refuses every byte, and to be cut as well."""
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    places = iter([Path("/dev/full"), tmp_path / "second"])
    file = ResilientAppender(lambda: next(places), end=b"")
    with pytest.raises(OSError, match="No space left"):
        file.append(b"abc")
    file.flush()
    assert (tmp_path / "second").read_bytes() == b"abc"


# -- files that other programs touch --------------------------------------------------------------


@pytest.mark.parametrize("victim", ["log", "logs", "run"])
def test_a_file_or_folder_that_vanished_is_made_again(victim: str, tmp_path: Path) -> None:
    path = tmp_path / "run" / "logs" / "log"
    file = appender(path, header=b"header\n")
    append(file, "a", "b")
    gone = {"log": path, "logs": path.parent, "run": tmp_path / "run"}[victim]
    gone.rename(tmp_path / "elsewhere")
    assert append(file, "c", "d") == 0
    assert path.read_text() == "header\nc\nd\n"
    (note,) = texts(file)
    assert note.startswith(f"{path} was deleted or moved while the run wrote to it")
    assert "with up to 2 entries; later entries are written to" in note


def test_a_new_file_may_have_another_name(tmp_path: Path) -> None:
    names = iter(["first", "second"])
    file = ResilientAppender(lambda: tmp_path / "logs" / next(names), header=b"*", end=b"")
    file.append(b"a")
    shutil.rmtree(tmp_path / "logs")
    file.append(b"b")
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["second"]
    assert (tmp_path / "logs" / "second").read_bytes() == b"*b"
    assert texts(file)[0].endswith(f"are written to {tmp_path / 'logs' / 'second'}")


@pytest.mark.parametrize(
    ("before", "end", "after"),
    [
        (b"a\nhalf of a li", b"\n", b"a\nhalf of a li\nb\nc\n"),  # torn by a crash
        (b"before", b"", b"beforeb\nc\n"),  # entries that know their length
        (b"", b"\n", b"b\nc\n"),
    ],
)
def test_what_a_file_ends_with_is_not_continued(
    before: bytes, end: bytes, after: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "log"
    path.write_bytes(before)
    file = appender(path, end=end)
    append(file, "b", "c")
    assert path.read_bytes() == after
    assert texts(file) == []


def test_a_file_that_was_cut_is_named_and_one_that_grew_is_no_loss(tmp_path: Path) -> None:
    path = tmp_path / "log"
    file = appender(path)
    append(file, "a", "b", "c")
    os.truncate(path, 3)  # "a", and half of "b"
    append(file, "d")
    assert path.read_text() == "a\nb\nd\n"
    (note,) = texts(file)
    assert note.startswith(f"{path} was cut or replaced while the run wrote to it")
    (tmp_path / "copy").write_text("a\nb\nd\nmine\n")
    (tmp_path / "copy").replace(path)
    append(file, "e")
    assert path.read_text() == "a\nb\nd\nmine\ne\n"
    assert texts(file) == []


# -- what comes first -----------------------------------------------------------------------------


def test_what_must_be_done_first_is_tried_until_it_is_done(tmp_path: Path) -> None:
    path, done = tmp_path / "log", []

    def prepare() -> None:
        if not (tmp_path / "allowed").exists():
            raise PermissionError("not yet")
        done.append(path.exists())

    file = appender(path, prepare=prepare)
    assert append(file, "a", "b") == 2
    assert not path.exists()
    (tmp_path / "allowed").touch()
    assert append(file, "c", "d") == 0
    assert done == [False]
    assert path.read_text() == "a\nb\nc\nd\n"


def test_a_signal_that_appends_in_the_midst_keeps_the_order(tmp_path: Path) -> None:
    path = tmp_path / "log"
    file = appender(path, prepare=lambda: signal.raise_signal(signal.SIGUSR1))
    before = signal.signal(signal.SIGUSR1, lambda *_: file.append(b"from the handler\n"))
    try:
        append(file, "first")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert path.read_text() == "first\nfrom the handler\n"
