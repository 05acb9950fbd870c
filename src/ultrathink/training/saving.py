"""Saving a run while it trains: off its thread, and again when the disk would not take it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch.distributed.tensor import DTensor

from ultrathink.checkpoint.format import WHOLE_MODEL, Header, save_checkpoint
from ultrathink.checkpoint.saver import CheckpointSaver, Outcome
from ultrathink.checkpoint.snapshots import SNAPSHOTS, Carried
from ultrathink.config.training import CheckpointConfig
from ultrathink.core.errors import CheckpointError
from ultrathink.core.files import remove_folder
from ultrathink.core.protocols import State
from ultrathink.parallel.store import new_store
from ultrathink.parallel.placement import shard_of
from ultrathink.parallel.world import ALONE, World
from ultrathink.runs.decisions import decision_of, state_name
from ultrathink.runs.folder import RunFolder
from ultrathink.training.host_states import copied_to_host
from ultrathink.training.run_state import Progress

_PAUSE_S = 0.1  # between looks at a disk that is waited for; a signal is heard in each


@dataclass(frozen=True)
class _Request:
    step: int
    state: State
    is_best: bool
    carried: Sequence[int]  # keys of snapshots


class Saving:
    """Hands copies of the state to a writing thread, and keeps those that could not be written.

    ``on_written(step, path)``, ``on_restored()`` (for a run folder that had vanished) and
    ``tell(text, level)`` are called on the caller's thread only, never on the writing one. The
    states in ``snapshots`` never change; they are looked up when a write begins, so that one the
    disk keeps waiting holds none of them.
    """

    def __init__(
        self,
        run: RunFolder,
        rule: CheckpointConfig,
        *,
        on_written: Callable[[int, Path], None],
        on_restored: Callable[[], None],
        tell: Callable[[str, Literal["info", "warning"]], None],
        world: World = ALONE,
        snapshots: Mapping[int, State] | None = None,
        header: Header = WHOLE_MODEL,
    ) -> None:
        self.rule = rule
        self.header = header
        self._on_written = on_written
        self._on_restored = on_restored
        self._tell = tell
        self._run = run
        self._world = world
        self._snapshots = snapshots if snapshots is not None else {}
        self._saver = CheckpointSaver(run, keep=rule.keep, header=header)
        self._under_way: _Request | None = None
        # At most two: the newest state, and the best one where that is another.
        self._unwritten: dict[str, _Request] = {}
        self._retry_at = 0.0
        self._abandoned = False
        self._told = ""  # the trouble that was told last

    def save(self, step: int, state: State, *, is_best: bool, carried: Sequence[int] = ()) -> None:
        """Write ``state`` soon; it is copied before this returns.

        With it the snapshots of the keys ``carried``, the newer ones last.
        """
        request = _Request(step, private_copy(state), is_best, tuple(carried))
        self.wait_for_outcome()
        self._unwritten.pop("newest", None)  # this one is newer
        self._submit(request)

    def is_due(self, progress: Progress, elapsed_s: float) -> bool:
        """Whether the rule asks for a checkpoint of this step, which has none yet."""
        rule, step = self.rule, progress.step
        if progress.last_checkpoint == step:
            return False
        since = elapsed_s - progress.last_checkpoint_s
        is_time = rule.every_minutes is not None and since >= rule.every_minutes * 60
        return is_time or progress.is_due(rule.every_steps)

    def note_snapshot(self, key: int, folder: Path) -> None:
        """The snapshot ``key`` was read from ``folder``, and need not be written again."""
        self._saver.snapshots.note(key, folder)

    @property
    def is_idle(self) -> bool:
        """Whether this process writes nothing now."""
        return not self._saver.busy

    def collect(self) -> None:
        """Tell what was written and what was not since the last call; try the latter again.

        On several processes, to be called by all once each ``is_idle``, and by none before.
        """
        self._take_outcomes()
        is_idle = self._under_way is None
        if self._unwritten and is_idle and self._now() >= self._retry_at:
            self._submit(min(self._unwritten.values(), key=lambda request: request.step))

    def keep_state(
        self, decision: int, key: int | None, state: State, *, most_decisions: int
    ) -> None:
        """Write what an audit of ``decision`` needs, at once: the state before it, or a snapshot.

        One that cannot be written is reported. States of older decisions than the last
        ``most_decisions`` are removed.
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
            self._tell(
                f"the state for {folder.name} could not be kept: {_reason(error)}", "warning"
            )

    def settle(self) -> None:
        """Wait for the write under way, and give up what could not be written so far."""
        self.wait_for_outcome()
        self._unwritten.clear()

    def wait_until_written(self) -> None:
        """Return when nothing is left to write; CheckpointError when the rule's patience ends."""
        self._saver.wait()
        self.collect()
        if not self._unwritten:
            return
        minutes = self.rule.patience_minutes
        deadline = self._now() + minutes * 60
        self._tell(
            f"training is done; waiting up to {minutes:g} minutes until its last checkpoint can be "
            f"written (Ctrl-C gives up)",
            "warning",
        )
        while self._unwritten or self._under_way is not None:
            if self._now() >= deadline:
                raise CheckpointError(
                    f"{self._told}, and not in the {minutes:g} minutes after the end of training "
                    f"(training.checkpoint.patience_minutes). Make room, then resume the run from "
                    f"the checkpoint before."
                )
            time.sleep(_PAUSE_S)
            if self._world.size > 1:
                self._saver.wait()
            self.collect()

    def abandon(self) -> None:
        """Leave an unfinished write unfinished: ``close`` will not wait for it."""
        self._abandoned = True

    def close(self) -> None:
        """End the writing thread, once what was handed to it is written."""
        self._saver.close(wait=not self._abandoned)
        if not self._abandoned:
            self._take_outcomes()

    def wait_for_outcome(self) -> None:
        """Return when the write under way, if any, is over."""
        self._saver.wait()
        self._take_outcomes()

    def _submit(self, request: _Request) -> None:
        self._under_way = request
        store = new_store(self._world)
        carried = self._still_held(request)
        state: State = dict(request.state)
        if carried:
            state[SNAPSHOTS] = [one.step for one in carried]
        self._saver.submit(request.step, state, is_best=request.is_best, store=store, carried=carried)

    def _still_held(self, request: _Request) -> list[Carried]:
        """The snapshots that are to go with a checkpoint, one for each step."""
        found: dict[int, Carried] = {}
        for key in request.carried:
            state: dict[str, Any] | None = self._snapshots.get(key)
            if state is not None:
                step = state["progress"]["step"]
                found[step] = Carried(key, step, own_shards(state))
        return [found[step] for step in sorted(found)]

    def _now(self) -> float:
        """A clock in seconds: on several processes that of the first, for all who ask together."""
        return self._world.of_main(time.monotonic())

    def _take_outcomes(self) -> None:
        for outcome in self._saver.outcomes():
            request, self._under_way = self._under_way, None
            assert request is not None
            assert request.step == outcome.step
            if outcome.restored:
                self._on_restored()
                self._tell("the run folder had vanished and was made again", "warning")
            if outcome.error is None:
                self._told = ""
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
        if not self._told.endswith(reason) or not self._told:  # not again and again
            self._tell(
                f"{text}; training goes on, and it is tried again every {self.rule.retry_s:g} s",
                "warning",
            )
        self._told = text


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
