"""Writes and removes files such that a crash leaves the old or the new ones, never half of one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write ``data`` to a temporary file, flush it to the disk, and rename it to ``path``."""
    payload = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill, which is then flushed to the disk and renamed to ``folder``.

    After an error nothing of it is left.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir()
        yield beside
        for path in beside.rglob("*"):
            if path.is_file():
                sync_file(path)
        sync_folder(beside)
        replace_folder(beside, folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def replace_folder(new: Path, folder: Path) -> None:
    """Rename ``new`` to ``folder``; an existing one is first renamed and finally deleted.

    A crash in between leaves the old one as ``.NAME.old``.
    """
    aside = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)
        try:
            os.rename(folder, aside)
            os.rename(new, folder)
        except BaseException:
            if aside.exists() and not folder.exists():
                os.rename(aside, folder)
            raise
    else:
        os.rename(new, folder)
    sync_folder(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Delete a folder by renaming it first: a crash in between leaves only ``.NAME.deleted``."""
    hidden = folder.with_name(f".{folder.name}.deleted")
    if hidden.exists():
        shutil.rmtree(hidden)
    os.rename(folder, hidden)
    shutil.rmtree(hidden)


def sync_file(path: Path) -> None:
    """Flush a file's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Flush the entries of a folder, so that a rename in it survives a power failure."""
    if os.name == "nt":  # Windows cannot open a folder for this
        return
    sync_file(folder)
