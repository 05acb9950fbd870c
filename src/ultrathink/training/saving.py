"""Saves a run while it trains, in another thread, and retries while the disk refuses."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.tensor import DTensor

from ultrathink.checkpoint.format import WHOLE_MODEL, Header, save_checkpoint
from ultrathink.checkpoint.saver import CheckpointSaver, Outcome
from ultrathink.checkpoint.snapshots import SNAPSHOTS, EmbeddedSnapshot
from ultrathink.config.training import CheckpointConfig
from ultrathink.core.errors import CheckpointError
from ultrathink.core.files import remove_folder
from ultrathink.core.protocols import State
from ultrathink.monitoring.records import Reporter
from ultrathink.parallel.placement import shard_of
from ultrathink.parallel.store import new_store
from ultrathink.parallel.world import ALONE, World
from ultrathink.runs.decisions import decision_of, state_name
from ultrathink.runs.folder import RunFolder
from ultrathink.training.host_states import copied_to_host
from ultrathink.training.run_state import Progress

_POLL_S = 0.1  # while waiting for the disk; signals are handled between polls


@dataclass(frozen=True)
class _Request:
    step: int
    state: State
    is_best: bool
    embedded: Sequence[int]  # keys of snapshots


class Saving:
    """Hands copies of the state to a writing thread, and keeps those that could not be written.

    ``on_written(step, path)``, ``on_restored()`` (after a run folder had vanished) and
    ``report(text, level)`` are called on the caller's thread only. The states in ``snapshots``
    never change; they are looked up when a write starts, so a checkpoint that waits for the disk
    holds none of them in memory.
    """

    def __init__(
        self,
        run: RunFolder,
        rule: CheckpointConfig,
        *,
        on_written: Callable[[int, Path], None],
        on_restored: Callable[[], None],
        report: Reporter,
        world: World = ALONE,
        snapshots: Mapping[int, State] | None = None,
        header: Header = WHOLE_MODEL,
    ) -> None:
        self.rule = rule
        self.header = header
        self._on_written = on_written
        self._on_restored = on_restored
        self._report = report
        self._run = run
        self._world = world
        self._snapshots = snapshots if snapshots is not None else {}
        self._saver = CheckpointSaver(run, keep=rule.keep, header=header)
        self._running: _Request | None = None
        # At most two: the newest state, and the best if that is another one.
        self._unwritten: dict[str, _Request] = {}
        self._retry_at = 0.0
        self._abandoned = False
        self._reported = ""  # the last problem

    def save(self, step: int, state: State, *, is_best: bool, embedded: Sequence[int] = ()) -> None:
        """Write ``state`` soon; it is copied before this returns.

        ``embedded`` are keys of snapshots to write with it, the newest last.
        """
        request = _Request(step, private_copy(state), is_best, tuple(embedded))
        self.wait_for_outcome()
        self._unwritten.pop("newest", None)  # this one is newer
        self._submit(request)

    def is_due(self, progress: Progress, elapsed_s: float) -> bool:
        """Whether a checkpoint of this step is due and not yet written."""
        rule, step = self.rule, progress.step
        if progress.last_checkpoint == step:
            return False
        since = elapsed_s - progress.last_checkpoint_s
        is_time = rule.every_minutes is not None and since >= rule.every_minutes * 60
        return is_time or progress.is_due(rule.every_steps)

    def note_snapshot(self, key: int, folder: Path) -> None:
        """Record that ``folder`` holds the snapshot ``key``, which need not be rewritten."""
        self._saver.snapshots.note(key, folder)

    @property
    def is_idle(self) -> bool:
        """Whether this process is writing nothing."""
        return not self._saver.busy

    def collect(self) -> None:
        """Report the saves that ended since the last call, and retry those that failed.

        Several processes call it together, once every one of them ``is_idle``.
        """
        self._take_outcomes()
        is_idle = self._running is None
        if self._unwritten and is_idle and self._now() >= self._retry_at:
            self._submit(min(self._unwritten.values(), key=lambda request: request.step))

    def keep_state(
        self, decision: int, key: int | None, state: State, *, most_decisions: int
    ) -> None:
        """Write what an audit of ``decision`` needs, at once: the state before it, or a snapshot.

        A failure is reported. Only the states of the last ``most_decisions`` decisions are kept.
        """
        self._saver.wait()
        folder = self._run.states / state_name(decision, key)
        try:
            store = new_store(self._world)
            save_checkpoint(folder, private_copy(state), store=store, header=self.header)
            if self._world.is_main:
                kept = self._run.kept_states()
                newest = sorted({decision_of(name) for name in kept})[-most_decisions:]
                for name in kept:
                    if decision_of(name) not in newest:
                        remove_folder(self._run.states / name)
        except OSError as error:
            self._report(
                f"the state for {folder.name} could not be kept: {_reason(error)}", "warning"
            )

    def settle(self) -> None:
        """Wait for the running save, and drop states that could not be written so far."""
        self.wait_for_outcome()
        self._unwritten.clear()

    def wait_until_written(self) -> None:
        """Return when everything is written.

        Raises CheckpointError after ``training.checkpoint.patience_minutes``.
        """
        self._saver.wait()
        self.collect()
        if not self._unwritten:
            return
        minutes = self.rule.patience_minutes
        deadline = self._now() + minutes * 60
        self._report(
            f"training is done; waiting up to {minutes:g} minutes until its last checkpoint can be "
            f"written (Ctrl-C gives up)",
            "warning",
        )
        while self._unwritten or self._running is not None:
            if self._now() >= deadline:
                raise CheckpointError(
                    f"{self._reported}, and not in the {minutes:g} minutes after the end of "
                    f"training (training.checkpoint.patience_minutes). Make room, then resume the "
                    f"run from the previous checkpoint."
                )
            time.sleep(_POLL_S)
            if self._world.size > 1:
                self._saver.wait()
            self.collect()

    def abandon(self) -> None:
        """Let ``close`` abandon an unfinished save."""
        self._abandoned = True

    def close(self) -> None:
        """End the writing thread, after the running save unless that is abandoned."""
        self._saver.close(wait=not self._abandoned)
        if not self._abandoned:
            self._take_outcomes()

    def wait_for_outcome(self) -> None:
        """Return when the running save, if any, has ended."""
        self._saver.wait()
        self._take_outcomes()

    def _submit(self, request: _Request) -> None:
        self._running = request
        embedded = self._embedded(request)
        state: State = dict(request.state)
        if embedded:
            state[SNAPSHOTS] = [one.step for one in embedded]
        self._saver.submit(
            request.step,
            state,
            is_best=request.is_best,
            store=new_store(self._world),
            embedded=embedded,
        )

    def _embedded(self, request: _Request) -> list[EmbeddedSnapshot]:
        """The snapshots of ``request`` that still exist, at most one for each step."""
        found: dict[int, EmbeddedSnapshot] = {}
        for key in request.embedded:
            state: dict[str, Any] | None = self._snapshots.get(key)
            if state is not None:
                step = state["progress"]["step"]
                found[step] = EmbeddedSnapshot(key, step, own_shards(state))
        return [found[step] for step in sorted(found)]

    def _now(self) -> float:
        """The clock of the first process, in seconds; all processes call it."""
        return self._world.of_main(time.monotonic())

    def _take_outcomes(self) -> None:
        for outcome in self._saver.outcomes():
            request, self._running = self._running, None
            assert request is not None
            assert request.step == outcome.step
            if outcome.restored:
                self._on_restored()
                self._report("the run folder had vanished and was created again", "warning")
            if outcome.error is None:
                self._reported = ""
                self._unwritten = {
                    kind: other
                    for kind, other in self._unwritten.items()
                    if other.step > request.step or (kind == "best" and not request.is_best)
                }
                self._on_written(outcome.step, outcome.path)
            else:
                self._keep(request, outcome)

    def _keep(self, request: _Request, outcome: Outcome) -> None:
        self._unwritten["best" if request.is_best else "newest"] = request
        self._retry_at = self._now() + self.rule.retry_s
        reason = _reason(outcome.error)
        text = f"the checkpoint of step {outcome.step} could not be written: {reason}"
        if not self._reported.endswith(reason) or not self._reported:  # only once
            self._report(
                f"{text}; training continues, with a retry every {self.rule.retry_s:g} s",
                "warning",
            )
        self._reported = text


def private_copy(state: Any) -> Any:
    """``state`` with every tensor copied to the CPU, where nothing changes it.

    A tensor that is divided among processes becomes the shard that this one writes.
    """
    return copied_to_host(own_shards(state))


def own_shards(state: Any) -> Any:
    """``state`` with each divided tensor replaced by the shard that this process writes.

    Nothing is copied.
    """
    if isinstance(state, DTensor):
        return shard_of(state)
    if isinstance(state, dict):
        return {key: own_shards(value) for key, value in state.items()}
    if isinstance(state, list):
        return [own_shards(value) for value in state]
    return state


def _reason(error: Exception | None) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}"
