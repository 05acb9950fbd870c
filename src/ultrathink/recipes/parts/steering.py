"""Lets the orchestrator steer a trainer."""

from __future__ import annotations

from functools import partial

from ultrathink.config.orchestrator import OrchestratorConfig, SnapshotsConfig
from ultrathink.core.errors import UltrathinkError
from ultrathink.monitoring.records import Reporter
from ultrathink.monitoring.sink_group import SinkGroup
from ultrathink.orchestrator.live import LiveWatch
from ultrathink.orchestrator.steering.outliers import OutlierGuard
from ultrathink.orchestrator.steering.steering import Steering
from ultrathink.training.host_states import host_bytes
from ultrathink.training.memory import host_memory_in_use
from ultrathink.training.parts import Parts
from ultrathink.training.run_log import RunLog
from ultrathink.training.trainer import Trainer

_SHARE_OF_FREE = 0.2
_GIB = 2**30
_MOST = 8  # snapshots; further ones would be too old to be useful


def steer(
    trainer: Trainer,
    config: OrchestratorConfig,
    watch: LiveWatch | None,
    log: RunLog,
    sinks: SinkGroup,
    report: Reporter,
) -> None:
    """Add a guard to ``trainer``, and on the first process, which has a ``watch``, the policy."""

    def show(step: int, title: str, text: str) -> None:
        sinks.decision(step, title, text)
        log.on_message(text, "info")

    guard = OutlierGuard(most=config.limits.skipped_share, report=report)
    if config.rules.skip_outliers and trainer.objective.is_guarded:
        trainer.set_guard(guard)
    if watch is None:
        return
    steering = Steering(
        config,
        watch=watch,
        outliers=guard,
        settings=trainer.settings,
        position=lambda: trainer.loader.samples_seen + trainer.loader.samples_skipped,
        most_snapshots=partial(room_for_snapshots, trainer.parts, config.snapshots),
        is_compiled=bool(trainer.training.compile),
        has_held_out=trainer.objective.can_score,
        best_checkpoint=trainer.run.best_step,
        log=log,
        show=show,
        report=report,
    )
    trainer.add_callback(steering.observer)
    trainer.add_controller(steering)


def orchestrator_of(trainer: Trainer) -> Steering:
    """The orchestrator that steers ``trainer``; UltrathinkError if there is none.

    ``get_adaptive_status()`` returns its decisions, ``best_snapshot(last_steps)`` a snapshot for a
    manual rollback.
    """
    for controller in trainer.controllers:
        if isinstance(controller, Steering):
            return controller
    raise UltrathinkError("this run is not steered; build it with orchestrator.mode=act.")


def room_for_snapshots(parts: Parts, config: SnapshotsConfig, before: int | None = None) -> int:
    """The number of snapshots of a run that fit into host memory, including existing ones.

    A resumed run that had room for ``before`` gets the same number, so that it behaves the same,
    unless that would take twice the share of the free memory. The processes of one machine share
    the host memory equally.
    """
    size = max(1, host_bytes(parts.state.state_dict())) / _GIB
    if config.max_gib is not None:
        return min(_MOST, int(config.max_gib // size))
    memory = host_memory_in_use(parts.world.local_size)
    free = memory.get("memory_limit", 2 * memory["memory"]) - memory["memory"]
    room = _SHARE_OF_FREE * max(0.0, free + len(parts.snapshots.embedded) * size) / size
    return before if before is not None and before <= 2 * room else min(_MOST, int(room))
