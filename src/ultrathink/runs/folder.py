"""The run folder: everything needed to resume, evaluate, generate from or explain a run."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ultrathink.checkpoint.format import (
    CHECKSUM_FILE,
    STATE_FILE,
    DamagedCheckpointError,
    Wanted,
    everything,
    files_of,
    has_its_sizes,
    save_checkpoint,
    verify_checkpoint,
)
from ultrathink.config.docs import to_yaml
from ultrathink.config.loading import CONFIG_FILE, ORIGINS_FILE, load_config
from ultrathink.config.schema import Config
from ultrathink.core.errors import CheckpointError, suggestion
from ultrathink.core.files import clean_up, remove_folder, write_atomic
from ultrathink.core.protocols import State
from ultrathink.core.store import SharedStore
from ultrathink.monitoring.jsonl import EXPERTS_FILE, METRICS_FILE, SAMPLES_FILE

_STEP_FOLDER = re.compile(r"^step_(\d{8,})$")
# Left by a killed process: see write_atomic, save_checkpoint, remove_folder.
_UNFINISHED_FILE = re.compile(r"^\..+\.\d+\.tmp$")
_UNFINISHED_FOLDER = re.compile(r"^\.+(step_\d{8,})\.(?:\w+\.)*(tmp|old|deleted)$")

NAME_IN_USE = "chosen at run time: name in use"


class _Place:
    """A file or folder of a run, by its name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, run: RunFolder, owner: type[RunFolder]) -> Path:
        return run.path / self._name


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run below ``path``."""

    path: Path

    @classmethod
    def create(cls, config: Config) -> tuple[RunFolder, Config]:
        """Create a folder for ``config``; a name in use gets a number (demo, demo-2)."""
        assert config.run.name is not None
        parent = Path(config.run.dir)
        parent.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            name = config.run.name if number == 1 else f"{config.run.name}-{number}"
            try:
                (parent / name).mkdir()
                break
            except FileExistsError:
                number += 1
        if number > 1:
            config = config.replace({"run.name": name}, origin=NAME_IN_USE)
        folder = cls(parent / name)
        try:
            folder.checkpoints.mkdir()
            folder.logs.mkdir()
            folder.write_config(config)
        except BaseException:
            clean_up(folder.path)
            raise
        return folder, config

    @property
    def name(self) -> str:
        return self.path.resolve().name

    checkpoints = _Place("checkpoints")
    tokenizer = _Place("tokenizer")
    logs = _Place("logs")
    states = _Place("states")
    metrics = _Place(METRICS_FILE)
    experts = _Place(EXPERTS_FILE)
    samples = _Place(SAMPLES_FILE)
    decisions = _Place("decisions.jsonl")
    events = _Place("events.jsonl")
    segments = _Place("segments.jsonl")
    manifest = _Place("manifest.json")
    data_record = _Place("data.json")
    lock_file = _Place(".lock")

    def kept_states(self) -> list[str]:
        """The names of the states kept for audits, the oldest first."""
        if not self.states.is_dir():
            return []
        return sorted(one.name for one in self.states.iterdir() if not one.name.startswith("."))

    def write_config(self, config: Config) -> None:
        """Write the resolved configuration, and the origin of each value."""
        import yaml

        write_atomic(self.path / CONFIG_FILE, to_yaml(config))
        write_atomic(self.path / ORIGINS_FILE, yaml.safe_dump(config.origins, sort_keys=False))

    def read_config(self) -> Config:
        return load_config(self.path)

    def founding(self) -> dict[str, bytes]:
        """The small files that a run's checkpoints need, by relative path."""
        wanted = [
            self.path / CONFIG_FILE,
            self.path / ORIGINS_FILE,
            self.manifest,
            self.data_record,
            self.segments,
            *(sorted(self.tokenizer.iterdir()) if self.tokenizer.is_dir() else []),
        ]
        return {
            path.relative_to(self.path).as_posix(): path.read_bytes()
            for path in wanted
            if path.is_file()
        }

    def restore_founding(self, files: dict[str, bytes]) -> bool:
        """Write missing ``files`` and folders; returns whether anything was missing."""
        lost_folders = [path for path in (self.checkpoints, self.logs) if not path.is_dir()]
        for path in lost_folders:
            path.mkdir(parents=True, exist_ok=True)
        lost_files = [name for name in files if not (self.path / name).exists()]
        for name in lost_files:
            path = self.path / name
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, files[name])
        return bool(lost_folders or lost_files)

    def clean(self) -> None:
        """Clean up what a killed process left unfinished; the caller must hold the run's lock."""
        for folder in (self.path, self.tokenizer):
            for path in folder.glob(".*.tmp"):
                if _UNFINISHED_FILE.match(path.name):
                    clean_up(path)
        if not self.checkpoints.is_dir():
            return
        for path in list(self.checkpoints.iterdir()):
            match = _UNFINISHED_FOLDER.match(path.name)
            if match is None:
                continue
            visible = self.checkpoints / match[1]
            if match[2] == "old" and not visible.exists():
                os.rename(path, visible)
            else:
                clean_up(path)
        for name in ("best", "last"):
            coming = self._coming(name)
            if coming.exists():
                os.replace(coming, self.checkpoints / name)
            elif coming.is_symlink():
                coming.unlink()
        self._mend_links()

    # -- checkpoints ---------------------------------------------------------------------------

    def step_path(self, step: int) -> Path:
        """The folder of the checkpoint of ``step``."""
        return self.checkpoints / f"step_{step:08d}"

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first; their content is not checked."""
        return [
            step
            for step in self.step_folders()
            if (self.step_path(step) / STATE_FILE).is_file()
            and (self.step_path(step) / CHECKSUM_FILE).is_file()
        ]

    def best_step(self) -> int | None:
        """The step of the best checkpoint; None if there is none."""
        best = self._target("best")
        return _step_of(best.name.removeprefix("step_")) if best is not None else None

    def checkpoint(self, which: str | int = "last") -> Path:
        """The folder of ``"last"``, ``"best"`` or a step; otherwise CheckpointError lists them."""
        steps = self.steps()
        if not steps:
            raise CheckpointError(
                f"run {self.path} has no checkpoint yet; it ended before the first was written. "
                f"Restart it: ultrathink train --resume {self.path}"
            )
        if which in ("last", "best"):
            best = self._target("best") if which == "best" else None
            return best or self.step_path(steps[-1])
        step, known = _step_of(which), ", ".join(map(str, steps))
        if step is None:
            raise CheckpointError(
                f"{which!r} is not a checkpoint; use last, best or a step: {known}."
            )
        if step not in steps:
            raise CheckpointError(
                f"run {self.path} has no checkpoint of step {step}; there are: {known}."
            )
        return self.step_path(step)

    def sound_checkpoint(
        self, which: str | int = "last", wanted: Wanted = everything
    ) -> tuple[Path, list[str]]:
        """An undamaged checkpoint, and a sentence on each damaged one that was skipped.

        If ``"last"`` or ``"best"`` is damaged, the newest sound one replaces it; a named step must
        itself be sound. Only the files read for the ``wanted`` tensors are compared with their
        checksums. Raises DamagedCheckpointError if no sound one is left.
        """
        step = _step_of(which)
        found = self.step_folders()
        is_known = which in ("last", "best") if step is None else step in found
        if not found or not is_known:
            return self.checkpoint(which), []  # raises the right error
        candidates = [self.step_path(number) for number in reversed(found)]
        chosen = self._target("best") if which == "best" else None
        if step is not None:
            candidates = [self.step_path(step)]
        elif chosen is not None:
            candidates = [chosen, *(path for path in candidates if path != chosen)]
        damaged: list[DamagedCheckpointError] = []
        for path in candidates:
            try:
                verify_checkpoint(path, files_of(path, wanted))
            except DamagedCheckpointError as error:
                damaged.append(error)
                continue
            return path, [
                f"checkpoint {error.folder.name} is damaged ({error.problem}); using {path.name}"
                for error in damaged
            ]
        if step is not None:
            problem, advice = damaged[0].problem, self._instead_of(step)
            raise DamagedCheckpointError(candidates[0], problem, advice)
        problems = "; ".join(f"{error.folder.name}: {error.problem}" for error in damaged)
        raise DamagedCheckpointError(
            self.checkpoints,
            f"no checkpoint in it is sound ({problems})",
            f"Start a new run like it: ultrathink train {self.path}",
        )

    def _instead_of(self, step: int) -> str:
        """The advice if the checkpoint of ``step`` cannot be used."""
        others = [number for number in self.steps() if number != step]
        if not others:
            return f"It is the only one of run {self.path}."
        nearest = max((number for number in others if number < step), default=others[0])
        known = ", ".join(map(str, others))
        return f"Use another (there are: {known}): --resume {self.path}@{nearest}"

    def save(
        self,
        step: int,
        state: State,
        *,
        is_best: bool,
        keep: int,
        store: SharedStore | None = None,
        write: Callable[..., None] = save_checkpoint,
    ) -> Path:
        """Write the checkpoint of ``step``, point ``last`` (and ``best``) to it, drop old ones.

        All processes that share ``store`` call it; the first updates links and removes old
        checkpoints.
        """
        path = self.step_path(step)
        if store is not None and store.rank > 0:
            write(path, state)
            return path
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        # A step that waited for a full disk may be written after a newer one.
        is_newest = step >= max(self.steps(), default=0)
        names = ["best"] * is_best + ["last"] * is_newest
        try:
            for name in names:  # first, so that clean() finds them after a crash
                self._prepare_link(name, path)
            write(path, state, once_whole=lambda: self._set_links(names))
        except BaseException:
            for name in names:
                clean_up(self._coming(name))
            raise
        with suppress(OSError):  # the checkpoint is written: pruning is retried after the next
            self.prune(keep, path)
        return path

    def remove_after(self, step: int) -> None:
        """Remove the checkpoints after ``step``: a run that resumes there writes new ones."""
        for later in self.step_folders():
            if later > step:
                remove_folder(self.step_path(later))
        self._mend_links()

    def step_folders(self) -> list[int]:
        """Steps that have a folder, complete or not, oldest first."""
        if not self.checkpoints.is_dir():
            return []
        matches = (
            _STEP_FOLDER.match(path.name)
            for path in self.checkpoints.iterdir()
            if path.is_dir() and not path.is_symlink()
        )
        return sorted(int(match[1]) for match in matches if match)

    def _target(self, name: str) -> Path | None:
        """The checkpoint that the link ``name`` leads to, if it exists."""
        link = self.checkpoints / name
        return self.checkpoints / link.resolve().name if link.exists() else None

    def _coming(self, name: str) -> Path:
        """The prepared link ``name``, before its target is complete."""
        return self.checkpoints / f".{name}.tmp"

    def _prepare_link(self, name: str, target: Path) -> None:
        self._coming(name).unlink(missing_ok=True)
        self._coming(name).symlink_to(target.name, target_is_directory=True)

    def _set_links(self, names: Sequence[str]) -> None:
        for name in names:
            os.replace(self._coming(name), self.checkpoints / name)

    def _mend_links(self) -> None:
        """Point ``last`` to the newest checkpoint, and remove broken links."""
        for name in ("last", "best"):
            link = self.checkpoints / name
            if link.is_symlink() and not link.exists():
                link.unlink()
        steps = self.steps()
        if steps:
            self._prepare_link("last", self.step_path(steps[-1]))
            self._set_links(["last"])

    def prune(self, keep: int, in_use: Path) -> None:
        """Remove checkpoints except the newest ``keep``, those named by links, and ``in_use``.

        Incomplete ones do not count among those kept, so they never displace a good one.
        """
        found = [self.step_path(step) for step in self.step_folders()]
        kept = {in_use, *[path for path in found if has_its_sizes(path)][-keep:]}
        kept |= {path for path in map(self._target, ("last", "best")) if path is not None}
        for path in found:
            if path not in kept:
                with suppress(OSError):  # the others may succeed
                    remove_folder(path)


def find_run(name: str, runs_dir: str | Path = "runs") -> RunFolder:
    """The run folder of a path, a run's name, or ``auto`` (the newest run)."""
    parent = Path(runs_dir)
    runs = _runs_below(parent)
    if name == "auto":
        if not runs:
            raise CheckpointError(
                f"there is no run in {parent}/ to resume; start one: ultrathink train"
            )
        return RunFolder(max(runs, key=last_change))
    for path in (Path(name), parent / name):
        if (path / CONFIG_FILE).is_file():
            return RunFolder(path)
    if Path(name).is_dir():
        raise CheckpointError(f"{name} is not a run folder: it has no {CONFIG_FILE}.")
    known = [run.name for run in runs]
    hint = suggestion(name, known) if known else f"There are no runs in {parent}/."
    raise CheckpointError(f"there is no run {name!r}. {hint}")


def split_run(text: str, unnamed: str = "last") -> tuple[str, str]:
    """Split ``RUN@step`` into the run and its checkpoint, by default ``unnamed``."""
    run, at, which = text.rpartition("@")
    return (run, which) if at and run else (text, unnamed)


def _runs_below(parent: Path) -> list[Path]:
    if not parent.is_dir():
        return []
    return sorted(path for path in parent.iterdir() if (path / CONFIG_FILE).is_file())


def last_change(run: Path) -> float:
    """When a run last wrote something, in unix seconds; 0 if unknown."""
    times = [0.0]
    for path in (run / METRICS_FILE, run / "checkpoints", run / CONFIG_FILE):
        with suppress(OSError):
            times.append(path.stat().st_mtime)
    return max(times)


def _step_of(which: str | int) -> int | None:
    try:
        return int(which)
    except ValueError:
        return None
