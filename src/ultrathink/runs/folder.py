"""The run folder: everything that resumes, evaluates, generates from or explains a run."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from ultrathink.config.docs import to_yaml
from ultrathink.config.loading import CONFIG_FILE, ORIGINS_FILE, load_config
from ultrathink.config.schema import Config
from ultrathink.core.errors import CheckpointError, suggestion
from ultrathink.core.files import write_atomic
from ultrathink.core.protocols import State
from ultrathink.runs.checkpoint import STATE_FILE, save_checkpoint

_STEP_FOLDER = re.compile(r"^step_(\d{8,})$")


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run below ``path``."""

    path: Path

    @classmethod
    def create(cls, config: Config) -> tuple[RunFolder, Config]:
        """Make a new folder for ``config``; a name in use gets a number (demo, demo-2)."""
        assert config.run.name is not None
        parent = Path(config.run.dir)
        number = 1
        while True:
            name = config.run.name if number == 1 else f"{config.run.name}-{number}"
            try:
                (parent / name).mkdir(parents=True)
                break
            except FileExistsError:
                number += 1
        if number > 1:
            config = config.replace({"run.name": name}, origin="chosen at run time: name in use")
        folder = cls(parent / name)
        folder.checkpoints.mkdir()
        folder.logs.mkdir()
        folder.write_config(config)
        return folder, config

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def decisions(self) -> Path:
        return self.path / "decisions.jsonl"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    def write_config(self, config: Config) -> None:
        """Keep the resolved configuration, and where each value came from."""
        import yaml

        write_atomic(self.path / CONFIG_FILE, to_yaml(config))
        write_atomic(self.path / ORIGINS_FILE, yaml.safe_dump(config.origins, sort_keys=False))

    def read_config(self) -> Config:
        return load_config(self.path)

    # -- checkpoints ---------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        found = []
        if self.checkpoints.is_dir():
            for entry in self.checkpoints.iterdir():
                match = _STEP_FOLDER.match(entry.name)
                if match and not entry.is_symlink() and (entry / STATE_FILE).is_file():
                    found.append(int(match[1]))
        return sorted(found)

    def checkpoint(self, which: str | int = "last") -> Path:
        """The folder of ``"last"``, ``"best"`` or a step; CheckpointError lists what there is."""
        steps = self.steps()
        if not steps:
            raise CheckpointError(
                f"run {self.path} has no checkpoint yet; it stopped before its first was written. "
                f"Start it again: ultrathink train {self.path}"
            )
        if which == "last":
            return self._step_path(steps[-1])
        if which == "best":
            best = self.checkpoints / "best"
            return best.resolve() if best.exists() else self._step_path(steps[-1])
        try:
            step = int(which)
        except ValueError:
            raise CheckpointError(
                f"{which!r} is not a checkpoint; use last, best or a step: "
                f"{', '.join(map(str, steps))}."
            ) from None
        if step not in steps:
            raise CheckpointError(
                f"run {self.path} has no checkpoint of step {step}; there are: "
                f"{', '.join(map(str, steps))}."
            )
        return self._step_path(step)

    def save(self, step: int, state: State, *, is_best: bool, keep: int) -> Path:
        """Write the checkpoint of ``step``, point ``last`` (and ``best``) to it, drop old ones."""
        path = self._step_path(step)
        save_checkpoint(path, state)
        self._point("last", path)
        if is_best:
            self._point("best", path)
        self._prune(keep)
        return path

    def remove_after(self, step: int) -> None:
        """Drop the checkpoints beyond ``step``: a run that goes on from there writes its own."""
        for later in self.steps():
            if later > step:
                shutil.rmtree(self._step_path(later))
        for name in ("last", "best"):
            link = self.checkpoints / name
            if link.is_symlink() and not link.exists():
                link.unlink()
        if self.steps():
            self._point("last", self._step_path(self.steps()[-1]))

    def _step_path(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:08d}"

    def _point(self, name: str, target: Path) -> None:
        """Make ``checkpoints/name`` a relative link to ``target``, in one move."""
        link = self.checkpoints / name
        beside = self.checkpoints / f".{name}.tmp"
        beside.unlink(missing_ok=True)
        beside.symlink_to(target.name, target_is_directory=True)
        os.replace(beside, link)

    def _prune(self, keep: int) -> None:
        kept = {self._step_path(step) for step in self.steps()[-keep:]}
        for name in ("last", "best"):
            link = self.checkpoints / name
            if link.exists():
                kept.add(self.checkpoints / link.resolve().name)
        for step in self.steps():
            if self._step_path(step) not in kept:
                shutil.rmtree(self._step_path(step))


def find_run(name: str, runs_dir: str | Path = "runs") -> RunFolder:
    """The run folder that a path, a run's name or ``auto`` (the newest run) stands for."""
    parent = Path(runs_dir)
    runs = _runs_below(parent)
    if name == "auto":
        if not runs:
            raise CheckpointError(
                f"there is no run in {parent}/ to resume; start one: ultrathink train"
            )
        return RunFolder(max(runs, key=_last_change))
    for path in (Path(name), parent / name):
        if (path / CONFIG_FILE).is_file():
            return RunFolder(path)
    if Path(name).is_dir():
        raise CheckpointError(f"{name} is not a run folder: it has no {CONFIG_FILE}.")
    known = [run.name for run in runs]
    hint = suggestion(name, known) if known else f"There are no runs in {parent}/."
    raise CheckpointError(f"there is no run {name!r}. {hint}")


def split_run(text: str) -> tuple[str, str]:
    """Split ``RUN@step`` into the run and its checkpoint, which is ``last`` when unnamed."""
    run, at, which = text.rpartition("@")
    return (run, which) if at and run else (text, "last")


def _runs_below(parent: Path) -> list[Path]:
    if not parent.is_dir():
        return []
    return sorted(path for path in parent.iterdir() if (path / CONFIG_FILE).is_file())


def _last_change(run: Path) -> float:
    watched = (run / "metrics.jsonl", run / "checkpoints", run / CONFIG_FILE)
    return max(path.stat().st_mtime for path in watched if path.exists())
