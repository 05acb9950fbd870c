"""Going on with a run: bit for bit as if it had not stopped, or with changes that are recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ultrathink.checkpoint.format import load_checkpoint, read_state
from ultrathink.config.loading import change_config
from ultrathink.config.overrides import parse_override
from ultrathink.config.schema import Config
from ultrathink.core.errors import UltrathinkError
from ultrathink.core.protocols import State
from ultrathink.data.documents import Progress as DataProgress
from ultrathink.data.prepare import PreparedData
from ultrathink.data.tokenizers.base import load_tokenizer
from ultrathink.monitoring.records import Level
from ultrathink.parallel.world import World, join_world
from ultrathink.recipes.parts.resumed_data import data_to_go_on_with, keep_record
from ultrathink.recipes.parts.resumed_snapshots import bring_back_snapshots
from ultrathink.recipes.parts.resumed_state import (
    adapt_state,
    check_changes,
    check_overrides,
    is_new_length,
)
from ultrathink.recipes.train import (
    assemble,
    begin_again,
    build_model,
    check_vocabulary,
    environment,
)
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.loading import check_loads
from ultrathink.runs.lock import RunLock
from ultrathink.runs.manifest import check_run_kind
from ultrathink.runs.segments import (
    ConfigChange,
    Segment,
    append_segment,
    differences,
    read_segments,
)
from ultrathink.runs.shortage import forget_shortage
from ultrathink.training.budget import Budget
from ultrathink.training.callbacks import Callback, Controller
from ultrathink.training.choices import choose_together
from ultrathink.training.run_state import region_needed
from ultrathink.training.trainer import Trainer

RESETS = ("optimizer", "schedule", "data")
_BITS_DEPEND_ON = {
    "torch": ("packages", "torch"),
    "processor": ("hardware", "cpu"),
    "threads": ("hardware", "threads"),
    "device": ("device",),
    "processes": ("processes",),
}
# Values that may differ between a checkpoint and config.yaml without anybody having changed them.
_NOT_COMPARED = ("run.name", "run.dir", "training.step_budget")


def resume_trainer(
    run: RunFolder,
    checkpoint: str = "last",
    *,
    overrides: Sequence[str] = (),
    reset: Sequence[str] = (),
    callbacks: Sequence[Callback] = (),
    controllers: Sequence[Controller] = (),
    progress: DataProgress | None = None,
) -> Trainer:
    """A trainer that goes on from a checkpoint of ``run``, bit for bit as if never stopped.

    ``overrides`` ("dotted.key=value") change the run from here on; ``reset`` lets the
    ``optimizer``, the ``schedule`` or the order of the ``data`` begin anew. Both are recorded in
    the run's ``segments.jsonl``. Raises ConfigError, DataError or CheckpointError.
    """
    plan = plan_resume(run, checkpoint, overrides=overrides, reset=reset)
    return plan.build(callbacks=callbacks, controllers=controllers, progress=progress)


@dataclass(frozen=True)
class ResumePlan:
    """From where a run goes on, and as what; holds the run's lock."""

    run: RunFolder
    lock: RunLock | None  # held by the first process, for all of them
    folder: Path  # the checkpoint
    plain: dict[str, Any]  # its state without the tensors
    before: Config  # the configuration it was made with
    config: Config  # the one to go on with
    changes: tuple[ConfigChange, ...]
    reset: frozenset[str]
    remarks: tuple[tuple[str, Level], ...] = field(default=())
    given: frozenset[str] = frozenset()  # keys that were given a value with this start

    @property
    def step(self) -> int:
        step: int = self.plain["progress"]["step"]
        return step

    @property
    def is_finished(self) -> bool:
        """Whether the run's length is used up, so that there is nothing to go on with."""
        if is_new_length(self.changes):
            return False
        elapsed_s = self.plain["progress"]["elapsed_s"]
        limit = self.config.training.max_minutes
        ending = Budget(**self.plain["budget"]).ending(self.step, elapsed_s, limit)
        return ending is not None and not ending.can_resume

    def build(
        self,
        *,
        callbacks: Sequence[Callback] = (),
        controllers: Sequence[Controller] = (),
        progress: DataProgress | None = None,
    ) -> Trainer:
        """Make the trainer, and record that the run goes on."""
        try:
            return self._build(callbacks, controllers, progress)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Give the run free, where nothing is to be done with it."""
        if self.lock is not None:
            self.lock.release()

    def _build(
        self,
        callbacks: Sequence[Callback],
        controllers: Sequence[Controller],
        progress: DataProgress | None,
    ) -> Trainer:
        run, world = self.run, join_world()
        tokenizer = load_tokenizer(run.tokenizer)
        data_hash = self.plain["identity"]["data_hash"]
        found = world.main_first(
            lambda: data_to_go_on_with(
                run, self.config, self.changes, data_hash, tokenizer, progress
            )
        )
        data: PreparedData = found.data
        check_vocabulary(self.config, data)
        config, choices = choose_together(self.config, data.num_samples, world)
        check_loads(self.folder, config.model)  # names what differs, where the model is another
        trainer = assemble(config, run, data, build_model(config), choices, callbacks, controllers)
        state: State = load_checkpoint(self.folder, region=partial(region_needed, trainer))
        reset = self.reset | {"data"} if found.other_samples else self.reset
        adapt_state(
            state, trainer, self.before, self.changes, reset, other_scores=found.other_scores
        )
        trainer.load_state_dict(state)
        trainer.fit_micro_batch()
        lost = bring_back_snapshots(
            trainer, config.orchestrator, self.folder, self.plain, self.changes, reset
        )
        trainer.loader.mix_by([source.weight for source in config.data.train])
        trainer.lock = self.lock
        here = environment(choices)
        trainer.remarks = [
            *self.remarks,
            *trainer.remarks,
            *((text, "warning") for text in found.notes),
            *((text, "warning") for text in lost),
            *((text, "warning") for text in _other_surroundings(run, here)),
        ]
        world.barrier()  # all have read what is removed or written now
        if not world.is_main:
            return trainer
        run.remove_after(trainer.progress.step)
        if "training.micro_batch_size" in self.given:
            forget_shortage(run)  # it is to be tried again
        # The segment first: it is what a start that dies right here is gone on with.
        append_segment(
            run.segments,
            Segment(
                from_step=self.step,
                changes=tuple(differences(self.before, config, _NOT_COMPARED)),
                reset=tuple(sorted(reset)),
                notes=tuple(found.notes),
                environment=here,
            ),
        )
        run.write_config(config)
        keep_record(run, data)
        return trainer


@dataclass(frozen=True)
class FreshStart:
    """A run that ended before its first checkpoint, and so begins again; holds the run's lock."""

    run: RunFolder
    lock: RunLock | None
    step: int = 0
    is_finished: bool = False

    def build(
        self,
        *,
        callbacks: Sequence[Callback] = (),
        controllers: Sequence[Controller] = (),
        progress: DataProgress | None = None,
    ) -> Trainer:
        """Make the trainer, in the same run folder."""
        try:
            return begin_again(
                self.run,
                self.lock,
                callbacks=callbacks,
                controllers=controllers,
                progress=progress,
            )
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Give the run free, where nothing is to be done with it."""
        if self.lock is not None:
            self.lock.release()


def plan_resume(
    run: RunFolder,
    checkpoint: str = "last",
    *,
    overrides: Sequence[str] = (),
    reset: Sequence[str] = (),
) -> ResumePlan | FreshStart:
    """Lock ``run``, find its checkpoint, and work out what is to change; trains nothing yet."""
    lock = _lock_for_all(run, join_world())
    try:
        if not run.steps() and checkpoint == "last":
            if overrides or reset:
                raise UltrathinkError(
                    f"run {run.path} ended before its first checkpoint, so there is nothing to go "
                    f"on with and change; resume it as it is, or begin a new run."
                )
            return FreshStart(run, lock)
        plan = _plan(run, lock, checkpoint, overrides, reset)
        check_changes(plan.changes, plan.reset, plan.step)
        return plan
    except BaseException:
        if lock is not None:
            lock.release()
        raise


def _lock_for_all(run: RunFolder, world: World) -> RunLock | None:
    """Hold ``run`` on the first process of ``world``, and put right what a crash left in it."""
    lock: RunLock | None = None
    error: Exception | None = None
    if world.is_main:
        try:
            check_run_kind(run.manifest, "train")
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
    before = Config.model_validate(plain["config"])
    here = run.read_config()
    base, pending = _with_last_start(before.with_origins(here.origins), run, step)
    remarks: list[tuple[str, Level]] = [(text, "warning") for text in damaged]
    edited = differences(base, here, _NOT_COMPARED) and differences(before, here, _NOT_COMPARED)
    if edited and checkpoint == "last" and not damaged:
        raise UltrathinkError(_edited(run, edited))
    remarks += [
        (f"as in the checkpoint of step {step}: {change.key} = {change.before}", "info")
        for change in edited
    ]
    check_overrides(overrides, base, run)
    config = change_config(base, overrides) if overrides else base
    changes = tuple(differences(before, config, _NOT_COMPARED))
    resets = frozenset(reset) | pending
    remarks += [(f"changed after step {step}: {change}", "info") for change in changes]
    remarks += [(f"begins anew after step {step}: the {what}", "info") for what in sorted(resets)]
    given = frozenset(parse_override(override)[0] for override in overrides)
    return ResumePlan(
        run, lock, folder, plain, before, config, changes, resets, tuple(remarks), given
    )


def _with_last_start(before: Config, run: RunFolder, step: int) -> tuple[Config, frozenset[str]]:
    """The checkpoint's configuration with the changes of the last start, if that was from here.

    A run that was resumed with changes, and died before its next checkpoint, goes on with them.
    """
    segments = read_segments(run.segments)
    if not segments or segments[-1].from_step != step:
        return before, frozenset()
    last = segments[-1]
    config = before.replace(
        {change.key: change.after for change in last.changes}, origin=f"changed after step {step}"
    )
    return config, frozenset(last.reset)


def _other_surroundings(run: RunFolder, here: dict[str, Any]) -> list[str]:
    """A sentence where the bits will not be those of the machine that the run was on before."""
    segments = read_segments(run.segments)
    if not segments:
        return []
    differing = []
    for name, keys in _BITS_DEPEND_ON.items():
        before = {"processes": 1, **segments[-1].environment}  # an older one does not say
        then, now = (_inside(place, keys) for place in (before, here))
        if then != now:
            differing.append(f"{name} {then} -> {now}")
    if not differing:
        return []
    return [f"the run goes on, but not bit for bit as it would have: {'; '.join(differing)}"]


def _inside(tree: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _edited(run: RunFolder, edited: Sequence[ConfigChange]) -> str:
    words = " ".join(f"{change.key}={change.after}" for change in edited[:4])
    listed = "; ".join(str(change) for change in edited[:4])
    return (
        f"{run.path / 'config.yaml'} is not what the run's last checkpoint was made with "
        f"({listed}). To go on with a change, put the file back and give the change with the "
        f"command, which records it: ultrathink train --resume {run.path} {words}"
    )
