"""Writes and removes files such that a crash leaves the old or the new ones, never half of one."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_ATTEMPTS = 3  # to delete a folder that is being written to


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
    except BaseException:
        clean_up(temporary)
        raise


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill, which is then flushed to the disk and renamed to ``folder``.

    After an error nothing of it is left.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f".{folder.name}.tmp")
    clean_up(beside)
    try:
        beside.mkdir()
        yield beside
        for path in beside.rglob("*"):
            if path.is_file():
                sync_file(path)
        sync_folder(beside)
        replace_folder(beside, folder)
    except BaseException:
        clean_up(beside)
        raise


def replace_folder(new: Path, folder: Path) -> None:
    """Rename ``new`` to ``folder``; an existing one is first renamed and finally deleted.

    A crash in between leaves the old one as ``.NAME.old``.
    """
    aside = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        if aside.exists():
            remove_folder(aside)
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
    clean_up(aside)


def remove_folder(folder: Path) -> None:
    """Rename a folder out of the way, then delete it as far as possible.

    A crash or a failure in between leaves only ``.NAME.ID.deleted``.
    """
    hidden = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.deleted")
    os.rename(folder, hidden)
    clean_up(hidden)


def clean_up(path: Path) -> None:
    """Delete a file or folder; what cannot be deleted is left, without an error.

    A folder may be written to meanwhile, which makes ``rmtree`` fail at random. Clean-up after a
    success must not turn it into a failure.
    """
    for _ in range(_ATTEMPTS):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()
        if not os.path.lexists(path):
            return


@contextmanager
def temporary_folder(prefix: str = "ultrathink-") -> Iterator[Path]:
    """A new folder for temporary files, which is cleaned up at the end."""
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        yield folder
    finally:
        clean_up(folder)


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
