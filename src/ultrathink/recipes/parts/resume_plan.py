"""Plans a resume: from which checkpoint, and with which changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ultrathink.checkpoint.format import read_state
from ultrathink.config.loading import change_config
from ultrathink.config.overrides import flatten, parse_override
from ultrathink.config.reflection import options_of
from ultrathink.config.schema import Config
from ultrathink.core.errors import UltrathinkError
from ultrathink.monitoring.records import Level
from ultrathink.parallel.world import World, join_world
from ultrathink.recipes.parts.resumed_data import decided
from ultrathink.recipes.parts.resumed_state import check_changes, check_overrides
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.lock import RunLock
from ultrathink.runs.manifest import check_run_kind
from ultrathink.runs.segments import ConfigChange, differences, read_segments
from ultrathink.training.budget import Budget


@dataclass(frozen=True)
class _LockedRun:
    run: RunFolder
    lock: RunLock | None  # held by the first process, for all of them

    def release(self) -> None:
        """Release the run's lock, where the run is not resumed after all."""
        if self.lock is not None:
            self.lock.release()


@dataclass(frozen=True)
class FreshStart(_LockedRun):
    """A run that ended before its first checkpoint, and so restarts."""

    step: int = 0
    is_finished: bool = False


@dataclass(frozen=True)
class ResumePlan(_LockedRun):
    """A checkpoint to resume and the configuration to resume it with."""

    folder: Path  # the checkpoint
    plain: dict[str, Any]  # its state without the tensors
    before: Config  # the configuration it was made with
    config: Config  # the configuration to resume with
    changes: tuple[ConfigChange, ...]
    reset: frozenset[str]
    remarks: tuple[tuple[str, Level], ...] = field(default=())
    given: frozenset[str] = frozenset()  # keys set by this start

    @property
    def step(self) -> int:
        step: int = self.plain["progress"]["step"]
        return step

    @property
    def is_finished(self) -> bool:
        """Whether the run's length is used up, so there is nothing to resume."""
        if decided(self.changes, "length"):
            return False
        elapsed_s = self.plain["progress"]["elapsed_s"]
        limit = self.config.training.max_minutes
        ending = Budget(**self.plain["budget"]).ending(self.step, elapsed_s, limit)
        is_over: bool = self.plain["progress"]["is_over"]
        return is_over or (ending is not None and not ending.can_resume)


def plan_resume(
    run: RunFolder,
    checkpoint: str = "last",
    *,
    overrides: Sequence[str] = (),
    reset: Sequence[str] = (),
) -> ResumePlan | FreshStart:
    """Lock ``run``, find its checkpoint, and determine the changes; does not train."""
    lock = _lock_for_all(run, join_world())
    try:
        if not run.steps() and checkpoint == "last":
            if overrides or reset:
                raise UltrathinkError(
                    f"run {run.path} ended before its first checkpoint, so it cannot be resumed "
                    f"with changes; resume it without, or start a new run."
                )
            return FreshStart(run, lock)
        plan = _plan(run, lock, checkpoint, overrides, reset)
        check_changes(plan.changes, plan.reset, plan.step)
        if lock is not None and plan.is_finished:
            # A kill after the last save may have left old checkpoints, and there is no later save.
            run.prune(plan.config.training.checkpoint.keep, plan.folder)
        return plan
    except BaseException:
        if lock is not None:
            lock.release()
        raise


def _lock_for_all(run: RunFolder, world: World) -> RunLock | None:
    """Lock ``run`` on the first process of ``world``, and clean up after a crash."""
    lock: RunLock | None = None
    error: Exception | None = None
    if world.is_main:
        try:
            check_run_kind(run)
            lock = RunLock.acquire(run)
            run.clean()
        except Exception as caught:
            error = caught
    try:
        world.raise_together(error)
    except BaseException:
        if lock is not None:
            lock.release()
        raise
    return lock


def _plan(
    run: RunFolder,
    lock: RunLock | None,
    checkpoint: str,
    overrides: Sequence[str],
    reset: Sequence[str],
) -> ResumePlan:
    folder, damaged = run.sound_checkpoint(checkpoint)
    plain = read_state(folder)
    step = plain["progress"]["step"]
    here = run.read_config()
    before = _placed_as(here, Config.model_validate(plain["config"]))
    base, pending = _with_last_start(before, run, step)
    remarks: list[tuple[str, Level]] = [(text, "warning") for text in damaged]
    edited = differences(base, here) and differences(before, here)
    if edited and checkpoint == "last" and not damaged:
        raise UltrathinkError(_edited(run, edited))
    remarks += [
        (f"as in the checkpoint of step {step}: {change.key} = {change.before}", "info")
        for change in edited
    ]
    check_overrides(overrides, base, run)
    config = change_config(base, overrides) if overrides else base
    changes = tuple(differences(before, config))
    resets = frozenset(reset) | pending
    felt = [change for change in changes if change.felt]
    remarks += [(f"changed after step {step}: {change}", "info") for change in felt]
    remarks += [(f"reset after step {step}: the {what}", "info") for what in sorted(resets)]
    given = frozenset(parse_override(override)[0] for override in overrides)
    return ResumePlan(
        run, lock, folder, plain, before, config, changes, resets, tuple(remarks), given
    )


def _placed_as(here: Config, config: Config) -> Config:
    """``config`` with the paths of ``here``, since a run may have been moved."""
    values = flatten(here.model_dump(mode="json"))
    shared = values.keys() & flatten(config.model_dump(mode="json")).keys()
    places = {
        key: values[key]
        for key, rule in options_of(Config).items()
        if rule.is_place and key in shared
    }
    return config.replace(places, origin="").with_origins(here.origins)


def _with_last_start(before: Config, run: RunFolder, step: int) -> tuple[Config, frozenset[str]]:
    """The checkpoint's configuration with the changes of the last start from this checkpoint.

    A run that was resumed with changes and died before its next checkpoint keeps them.
    """
    segments = read_segments(run.segments)
    if not segments or segments[-1].from_step != step:
        return before, frozenset()
    last = segments[-1]
    config = before.replace(
        {change.key: change.after for change in last.changes}, origin=f"changed after step {step}"
    )
    return config, frozenset(last.reset)


def _edited(run: RunFolder, edited: Sequence[ConfigChange]) -> str:
    words = " ".join(f"{change.key}={change.after}" for change in edited[:4])
    listed = "; ".join(str(change) for change in edited[:4])
    return (
        f"{run.path / 'config.yaml'} differs from the configuration of the last checkpoint "
        f"({listed}). To resume with a change, restore the file and give the change in the "
        f"command, which records it: ultrathink train --resume {run.path} {words}"
    )
