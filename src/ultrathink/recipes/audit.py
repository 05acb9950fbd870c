"""Replays a run with and without a decision, over several data orders, to measure its effect.

Both branches start from the states kept at the decision, train on the same data to the same step,
and are scored on the same held-out text. The mean of the paired differences has Student's
t-interval.
"""

from __future__ import annotations

import math
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ultrathink.checkpoint.format import load_checkpoint
from ultrathink.core.errors import UltrathinkError
from ultrathink.core.files import temporary_folder
from ultrathink.data.loader import TrainLoader
from ultrathink.orchestrator.steering.proposals import SKIP_BATCH
from ultrathink.recipes.resume import resume_trainer
from ultrathink.runs.decisions import Audit, add_to_decision, read_decisions, state_name
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.lock import RunLock
from ultrathink.runs.reading import RunReader
from ultrathink.training.callbacks import Controller, StepReport
from ultrathink.training.change import Change
from ultrathink.training.changes import Stop, change_from
from ultrathink.training.control import TrainerControl
from ultrathink.training.model_state import placed_state
from ultrathink.training.parts import Parts
from ultrathink.training.trainer import Trainer

_LEFT_OUT = (
    "checkpoints",
    "states",
    "logs",
    "tensorboard",
)  # parts of a run that a replay does not need
_FARTHEST = 1000  # largest rollback of a decision, in steps, that data orders leave room for
_QUIET = (
    "orchestrator.mode=off",
    "monitoring.sinks=[]",
    "training.sample.prompts=[]",
    "training.eval.every_steps=null",
    "training.evaluators=[]",
    "training.checkpoint.every_steps=null",
    "training.checkpoint.every_minutes=null",
)
# Two-sided 95% quantiles of Student's t, by degrees of freedom; beyond, those of the normal.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def audit_run(
    run: RunFolder,
    *,
    decision: int | None = None,
    orders: int = 4,
    horizon: int | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> dict[int, Audit]:
    """Audit one decision of ``run``, or all whose states were kept; writes results to the records.

    ``horizon`` is in steps, by default 200, and limited by the steps left in the run. Raises
    UltrathinkError if there is nothing to audit.
    """
    if orders < 2:
        raise UltrathinkError(f"--orders {orders}: an interval needs 2 data orders or more.")
    if horizon is not None and horizon < 1:
        raise UltrathinkError(f"--horizon {horizon}: give a number of steps, 1 or more.")
    lock = RunLock.acquire(run)
    try:
        results = {}
        for record in _chosen(run, decision):
            report(f"decision {record['id']}: {record['action']} at step {record['step']:,}")
            audit = _audit(run, record, orders, horizon or 200, report)
            results[record["id"]] = audit
            add_to_decision(run.decisions, record["id"], audit=asdict(audit))
        return results
    finally:
        lock.release()


def _chosen(run: RunFolder, wanted: int | None) -> list[dict[str, Any]]:
    """The records to audit."""
    records = {one["id"]: one for one in read_decisions(run.decisions) if one.get("id") is not None}
    kept = set(run.kept_states())
    at_hand = [number for number in records if state_name(number) in kept]
    if not records:
        mode = RunReader(run).orchestrator_mode()
        why = "it had no reason to change the run" if mode == "act" else "only act makes decisions"
        raise UltrathinkError(
            f"run {run.path} has no decisions to audit: it trained with orchestrator.mode={mode}, "
            f"and {why}."
        )
    if wanted is None and at_hand:
        return [records[number] for number in at_hand]
    if wanted is not None and wanted not in records:
        raise UltrathinkError(
            f"run {run.path} has no decision {wanted}; there are 1 to {max(records)}."
        )
    if wanted is None or wanted not in at_hand:
        listed = ", ".join(map(str, at_hand)) or "none"
        which = f"decision {wanted}" if wanted is not None else "any decision"
        raise UltrathinkError(
            f"the state before {which} is gone, so it cannot be replayed (kept: {listed}); "
            f"orchestrator.kept_states sets how many are kept."
        )
    return [records[wanted]]


def _audit(
    run: RunFolder, record: dict[str, Any], orders: int, horizon: int, report: Callable[[str], None]
) -> Audit:
    differences = []
    for order in range(orders):
        losses = [_replay(run, record, order, horizon, acts=acts) for acts in (True, False)]
        differences.append(losses[0] - losses[1])
        report(f"  order {order + 1} of {orders}: {losses[0]:.4f} with it, {losses[1]:.4f} without")
    mean = statistics.fmean(differences)
    freedom = len(differences) - 1
    quantile = _T95[freedom - 1] if freedom <= len(_T95) else 1.96
    half = quantile * statistics.stdev(differences) / math.sqrt(len(differences))
    return Audit(mean, mean - half, mean + half, orders, horizon, differences)


def _replay(
    run: RunFolder, record: dict[str, Any], order: int, horizon: int, *, acts: bool
) -> float:
    """The validation loss of one branch, ``horizon`` steps after the decision."""
    with temporary_folder("ultrathink-audit-") as scratch:
        end = _StopAt(record["step"] + horizon)
        trainer = branch(run, record, scratch / "run", acts=acts, controllers=[end])
        # The data of an order follows after that of all earlier orders.
        trainer.loader.skip(order * (horizon + _FARTHEST) * trainer.loader.batch_size)
        if trainer.ending is None:
            trainer.fit()
        else:
            trainer.close()
        if not trainer.objective.can_score:
            raise UltrathinkError(f"run {run.path} has no held-out text to judge a decision by.")
        return trainer.score().loss


def branch(
    run: RunFolder,
    record: dict[str, Any],
    folder: Path,
    *,
    acts: bool,
    controllers: Sequence[Controller] = (),
) -> Trainer:
    """A trainer in ``folder`` in the state of ``run`` after the decision, or without it."""
    copy = _copy(run, run.states / state_name(record["id"]), folder)
    trainer = resume_trainer(copy, overrides=_QUIET, controllers=controllers)
    # A run limited in minutes is replayed with the resulting number of steps.
    trainer.length.max_minutes = None
    if acts:
        for change in map(change_from, record["changes"]):
            _apply(trainer.parts, change, run, record["id"])
    elif record["action"] == SKIP_BATCH:
        _take_back(trainer.loader)
    return trainer


def _apply(parts: Parts, change: Change, run: RunFolder, number: int) -> None:
    """Repeat a change of decision ``number``, with the snapshots kept for it."""
    for one in change.needed:
        folder, kind = run.states / state_name(number, one.key), parts.stepper.objective.kind
        state = load_checkpoint(folder, kind=kind)
        placed = placed_state(state, parts.models, parts.stepper.host_names)
        parts.snapshots.keep(one.key, placed, in_checkpoints=False)
    change.apply(parts)


def _take_back(loader: TrainLoader) -> None:
    """Let the skipped batch come next."""
    state: dict[str, Any] = dict(loader.state_dict())
    state["samples_seen"] -= loader.batch_size
    loader.load_state_dict(state)


class _StopAt(Controller):
    def __init__(self, step: int) -> None:
        self.step = step

    def at_boundary(self, report: StepReport, control: TrainerControl) -> None:
        if report.step >= self.step:
            control.request(Stop(), reason="the horizon of an audit")


def _copy(run: RunFolder, state: Path, to: Path) -> RunFolder:
    """A copy of the run at the time of ``state``."""
    shutil.copytree(run.path, to, ignore=lambda folder, names: _ignored(run, folder, names))
    copy = RunFolder(to)
    copy.lock_file.unlink(missing_ok=True)
    step = read_step(state)
    shutil.copytree(state, copy.step_path(step))
    (copy.checkpoints / "last").symlink_to(copy.step_path(step).name)
    return copy


def _ignored(run: RunFolder, folder: str, names: list[str]) -> list[str]:
    return [name for name in names if Path(folder) == run.path and name in _LEFT_OUT]


def read_step(state: Path) -> int:
    """The step at which a state was taken."""
    from ultrathink.checkpoint.format import read_state

    step: int = read_state(state)["progress"]["step"]
    return step
