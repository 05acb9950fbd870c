"""Every run below a folder, in a line each: its state, how far it is and how well it does."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ultrathink.checkpoint.format import has_its_sizes, read_state
from ultrathink.config.loading import CONFIG_FILE
from ultrathink.core.errors import CheckpointError, UltrathinkError
from ultrathink.monitoring.records import MetricRecord
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.lock import Owner, holder
from ultrathink.runs.reading import config_tree, last_records

State = Literal["running", "finished", "stopped", "empty", "damaged"]
# Whether a run is over, given a checkpoint's state and the run's configuration.
IsOver = Callable[[Mapping[str, Any], Mapping[str, Any]], bool]


@dataclass(frozen=True)
class RunSummary:
    """One run as its files tell of it; None where they do not.

    ``state`` is ``running`` while a process holds the run's lock, ``finished`` at the end of its
    budget, ``stopped`` where it can be resumed, ``empty`` without a checkpoint, and ``damaged``
    where its configuration or last checkpoint cannot be used: ``problem`` says why.
    """

    name: str
    path: Path
    state: State
    problem: str | None
    owner: Owner | None
    step: int | None  # the last that was logged or saved
    total_steps: int | None
    checkpoints: tuple[int, ...]  # steps
    train_loss: float | None  # nats; of the last logged step
    val_loss: float | None  # nats; of the last validation
    bits_per_byte: float | None
    changed: float  # unix seconds
    size_bytes: int


def list_runs(folder: Path, is_over: IsOver) -> list[RunSummary]:
    """The runs directly below ``folder``, newest change first."""
    if not folder.is_dir():
        raise UltrathinkError(
            f"there is no folder {folder}. Runs are kept in runs/ unless run.dir says otherwise; "
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
    """Read what a run has come to; whatever is wrong with its files, it has a summary."""
    owner = holder(run)
    problems: list[str] = []
    config = _config(run, problems)
    state = _last_state(run, problems)
    over = False
    if config and state and not problems:
        try:
            over = is_over(state, config)
        except (LookupError, TypeError, ValueError):
            problems.append("its last checkpoint does not say how far it is")
    steps = tuple(run.steps())
    damage = "; ".join(problems)
    records, trouble = _last_records(run)
    train = records["train"].values if "train" in records else {}
    val = records["val"].values if "val" in records else {}
    return RunSummary(
        name=run.path.name,
        path=run.path,
        state=_state_of(owner, damage, steps, over),
        problem="; ".join([*problems, *trouble]) or None,
        owner=owner,
        step=max([*steps[-1:], *(record.step for record in records.values())], default=None),
        total_steps=_total_steps(config, state),
        checkpoints=steps,
        train_loss=train.get("loss"),
        val_loss=val.get("loss"),
        bits_per_byte=val.get("bits_per_byte"),
        changed=last_change(run.path),
        size_bytes=size_on_disk(run.path),
    )


def last_change(run: Path) -> float:
    """When a run last wrote something, in unix seconds; 0 where nothing can be asked."""
    times = [0.0]
    for path in (run / "metrics.jsonl", run / "checkpoints", run / CONFIG_FILE):
        with suppress(OSError):
            times.append(path.stat().st_mtime)
    return max(times)


def size_on_disk(folder: Path, counted: set[tuple[int, int]] | None = None) -> int:
    """The bytes of all files below ``folder``, links not followed; what vanishes is passed over.

    A file of several names counts once; ``counted`` are those that did already.
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


def _state_of(owner: Owner | None, damage: str, steps: tuple[int, ...], over: bool) -> State:
    if owner is not None:
        return "running"
    if damage:
        return "damaged"
    if not steps:
        return "empty"
    return "finished" if over else "stopped"


def _config(run: RunFolder, problems: list[str]) -> dict[str, Any]:
    try:
        config = config_tree(run.path)
        if not isinstance(config.get("training"), dict):
            problems.append(f"{CONFIG_FILE} has no section training")
            return {}
    except CheckpointError as error:
        problems.append(_within(run, error))
        return {}
    return config


def _last_state(run: RunFolder, problems: list[str]) -> dict[str, Any]:
    """The state in the newest checkpoint, empty where there is none or it is of no use."""
    folders = sorted(run.checkpoints.glob("step_*")) if run.checkpoints.is_dir() else []
    if not folders:
        return {}
    try:
        state = read_state(folders[-1])
    except CheckpointError as error:
        problems.append(_within(run, error))
        return {}
    if not has_its_sizes(folders[-1]):
        problems.append(
            f"checkpoints/{folders[-1].name} is not whole: a file is missing or has another size"
        )
    return state


def _last_records(run: RunFolder) -> tuple[dict[str, MetricRecord], list[str]]:
    try:
        return last_records(run.metrics), []
    except FileNotFoundError:
        return {}, []
    except OSError as error:
        return {}, [f"{run.metrics.name} cannot be read: {error.strerror}"]


def _total_steps(config: Mapping[str, Any], state: Mapping[str, Any]) -> int | None:
    """The run's length: the configuration's, which is newer where the run was made longer."""
    training, budget = config.get("training", {}), state.get("budget") or {}
    found = training.get("max_steps") or training.get("step_budget") or budget.get("total_steps")
    return found if isinstance(found, int) else None


def _within(run: RunFolder, error: CheckpointError) -> str:
    """An error's message as a part of a line about its run."""
    return str(error).replace(f"{run.path}{os.sep}", "").rstrip(".")
