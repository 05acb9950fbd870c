"""How a run is changed while it runs: requests wait for a step boundary, and each is recorded."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

from ultrathink.training.change import Change
from ultrathink.training.changes import change_from
from ultrathink.training.silent_changes import ForgetSnapshot, RecallCheckpoint, TakeSnapshot
from ultrathink.training.snapshots import Snapshot


class TrainerControl(Protocol):
    """What a controller may do to a run."""

    def request(self, change: Change, reason: str) -> None:
        """Have ``change`` applied before the next step."""

    def snapshot(self, *, in_checkpoints: bool = False) -> Snapshot:
        """Copy the whole state (weights, optimizer, data position, random state).

        The copy is taken at this step boundary, before anything else that was asked for. Those
        ``in_checkpoints`` outlive a resume, where ``brought_back`` finds them.
        """

    def brought_back(self, step: int) -> Snapshot | None:
        """The snapshot of ``step`` that the checkpoint held with which the run was resumed, to
        whoever asks first."""


class Request(NamedTuple):
    """A change that is asked of a run."""

    change: Change
    reason: str
    decision: int | None = None


class ControlQueue:
    """Requests that wait for the step boundary; ``TrainerControl`` for everyone but the trainer.

    ``step`` tells the step of the boundary. Where the run is ``shared`` by several processes, only
    what all of them agreed on is applied: a signal may reach one of them after that.
    """

    def __init__(self, step: Callable[[], int], *, shared: bool = False) -> None:
        self._step = step
        self._is_shared = shared
        self._agreed: list[Request] = []
        self._keys = itertools.count()
        self._pending: list[Request] = []
        self._taken: list[Request] = []  # last: their snapshots stay until they are applied
        self._decision: int | None = None
        self._brought_back: dict[int, Snapshot] = {}

    @contextmanager
    def deciding(self, number: int) -> Iterator[None]:
        """What is asked for inside belongs to the decision ``number``."""
        self._decision = number
        try:
            yield
        finally:
            self._decision = None

    @property
    def num_waiting(self) -> int:
        """Requests that were not taken yet."""
        return len(self._pending)

    def request(self, change: Change, reason: str) -> None:
        self._pending.append(Request(change, reason, self._decision))

    def is_requested(self, kind: type[Change]) -> bool:
        """Whether a change of this kind waits."""
        return any(isinstance(request.change, kind) for request in self._pending)

    def snapshot(self, *, in_checkpoints: bool = False) -> Snapshot:
        snapshot = self._new_snapshot(self._step())
        self.request(TakeSnapshot(snapshot.key, in_checkpoints), "")
        return snapshot

    def recall(self, step: int) -> Snapshot:
        """The checkpoint of ``step`` as a snapshot, which is read at this step boundary."""
        snapshot = self._new_snapshot(step)
        self.request(RecallCheckpoint(step, snapshot.key), "")
        return snapshot

    def bring_back(self, step: int) -> Snapshot:
        """Let ``brought_back`` find a snapshot of ``step``, whose state the caller has."""
        self._brought_back[step] = snapshot = self._new_snapshot(step)
        return snapshot

    def brought_back(self, step: int) -> Snapshot | None:
        return self._brought_back.pop(step, None)

    def _new_snapshot(self, step: int) -> Snapshot:
        snapshot = Snapshot(step, next(self._keys))
        # Not the queue itself: it would keep the run, and so the snapshot, for ever.
        forget = weakref.finalize(snapshot, _forget, weakref.ref(self), snapshot.key)
        forget.atexit = False
        return snapshot

    def take(self) -> list[Request]:
        """The requests to apply at this boundary, snapshots first, then the oldest."""
        if self._is_shared:
            self._taken, self._agreed = self._agreed, []
        else:
            self._taken, self._pending = self._pending, []
        first = (TakeSnapshot, RecallCheckpoint)
        return sorted(self._taken, key=lambda one: not isinstance(one.change, first))

    def take_json(self) -> list[Any]:
        """The waiting requests as plain values, to be sent to all processes, this one too."""
        self._taken, self._pending = self._pending, []
        return [[one.change.to_json(), one.reason, one.decision] for one in self._taken]

    def agree_on(self, requests: Sequence[Any]) -> None:
        """Let the requests of all processes be applied at this boundary."""
        self._agreed += [
            Request(change_from(change), reason, decision) for change, reason, decision in requests
        ]


def _forget(queue: weakref.ref[ControlQueue], key: int) -> None:
    """Nobody can ask for the snapshot ``key`` any more."""
    found = queue()
    if found is not None:
        found.request(ForgetSnapshot(key), "")
