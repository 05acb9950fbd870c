"""Lists the runs in a folder: state, progress and losses of each."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ultrathink.config.loading import CONFIG_FILE
from ultrathink.core.errors import UltrathinkError
from ultrathink.runs.folder import RunFolder, last_change
from ultrathink.runs.lock import Owner, holder
from ultrathink.runs.reading import RunReader

State = Literal["running", "finished", "stopped", "empty", "damaged"]
# Whether a run is finished, from a checkpoint's state and the run's configuration.
IsOver = Callable[[Mapping[str, Any], Mapping[str, Any]], bool]


@dataclass(frozen=True)
class RunSummary:
    """A run as described by its files; None for values they lack.

    ``state`` is ``running`` while a process holds the run's lock, ``finished`` at the end of its
    budget, ``stopped`` if it can be resumed, ``empty`` without a checkpoint, and ``damaged`` if its
    configuration or last checkpoint cannot be used: ``problem`` says why.
    """

    name: str
    path: Path
    state: State
    problem: str | None
    owner: Owner | None
    step: int | None  # the last one logged or saved
    total_steps: int | None
    checkpoints: tuple[int, ...]  # steps
    train_loss: float | None  # nats; of the last logged step
    val_loss: float | None  # nats; of the last validation
    bits_per_byte: float | None
    changed: float  # unix seconds
    size_bytes: int


def list_runs(folder: Path, is_over: IsOver) -> list[RunSummary]:
    """The runs directly in ``folder``, last changed first."""
    if not folder.is_dir():
        raise UltrathinkError(
            f"there is no folder {folder}. Runs are in runs/ unless run.dir says otherwise; "
            f"name their folder: ultrathink runs DIR, or start a first one: ultrathink train"
        )
    if (folder / CONFIG_FILE).is_file():
        raise UltrathinkError(
            f"{folder} is a run itself, not a folder of runs; to check it: "
            f"ultrathink runs check {folder}"
        )
    runs = [
        summarize(RunFolder(path), is_over) for path in folder.iterdir() if _looks_like_a_run(path)
    ]
    return sorted(runs, key=lambda run: (-run.changed, run.name))


def summarize(run: RunFolder, is_over: IsOver) -> RunSummary:
    """The summary of a run, even if its files are damaged."""
    owner, reader = holder(run), RunReader(run)
    config = reader.attempt(reader.config) or {}
    if config and not isinstance(config.get("training"), dict):
        reader.problems.append(f"{CONFIG_FILE} has no section training")
        config = {}
    state = reader.attempt(reader.last_state) or {}
    over = False
    if config and state and not reader.problems:
        try:
            over = is_over(state, config)
        except (LookupError, TypeError, ValueError):
            reader.problems.append("its last checkpoint has no progress")
    steps = tuple(run.steps())
    is_damaged = bool(reader.problems)
    records = reader.attempt(reader.last_records) or {}
    last_steps = [record.step for record in records.values()]
    train = records["train"].values if "train" in records else {}
    val = records["val"].values if "val" in records else {}
    return RunSummary(
        name=run.path.name,
        path=run.path,
        state=_state_of(owner, is_damaged, steps, over),
        problem="; ".join(reader.problems) or None,
        owner=owner,
        step=steps[-1] if over else max([*steps[-1:], *last_steps], default=None),
        total_steps=reader.planned_steps(state),
        checkpoints=steps,
        train_loss=train.get("loss"),
        val_loss=val.get("loss"),
        bits_per_byte=val.get("bits_per_byte"),
        changed=last_change(run.path),
        size_bytes=size_on_disk(run.path),
    )


def size_on_disk(folder: Path, counted: set[tuple[int, int]] | None = None) -> int:
    """The bytes of all files below ``folder``; links are not followed, vanished files skipped.

    A file with several names counts once; ``counted`` are those already counted.
    """
    total, counted = 0, set() if counted is None else counted
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    total += size_on_disk(Path(entry.path), counted)
                    continue
                found = entry.stat(follow_symlinks=False)
                if found.st_nlink > 1 and (found.st_dev, found.st_ino) in counted:
                    continue
                if found.st_nlink > 1:
                    counted.add((found.st_dev, found.st_ino))
                total += found.st_size
    return total


def _looks_like_a_run(path: Path) -> bool:
    if path.name.startswith(".") or not path.is_dir():
        return False
    return any((path / name).exists() for name in (CONFIG_FILE, "checkpoints", "metrics.jsonl"))


def _state_of(owner: Owner | None, is_damaged: bool, steps: tuple[int, ...], over: bool) -> State:
    if owner is not None:
        return "running"
    if is_damaged:
        return "damaged"
    if not steps:
        return "empty"
    return "finished" if over else "stopped"
