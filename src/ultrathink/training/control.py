"""Changes a run while it trains: requests wait for a step boundary, and each is recorded."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, Protocol

from ultrathink.training.change import Change
from ultrathink.training.changes import change_from
from ultrathink.training.expert_changes import AddExpert, Layer, PruneExpert
from ultrathink.training.silent_changes import ForgetSnapshot, RecallCheckpoint, TakeSnapshot
from ultrathink.training.snapshots import Snapshot


class TrainerControl(Protocol):
    """What a controller may do to a run."""

    def request(self, change: Change, reason: str) -> None:
        """Apply ``change`` before the next step."""

    def add_expert(
        self,
        layer: Layer,
        group: str,
        source: int | None = None,
        *,
        how: Literal["split", "copy"] = "split",
        reason: str = "asked for",
    ) -> None:
        """Request ``AddExpert``."""
        self.request(AddExpert(layer, group, source, how), reason)

    def prune_expert(
        self,
        layer: Layer,
        group: str,
        expert: int | None = None,
        *,
        how: Literal["drop", "merge"] = "drop",
        reason: str = "asked for",
    ) -> None:
        """Request ``PruneExpert``."""
        self.request(PruneExpert(layer, group, expert, how), reason)

    def snapshot(self, *, in_checkpoints: bool = False) -> Snapshot:
        """Copy the whole state (weights, optimizer, data position, random state).

        The copy is taken at this step boundary, before any other request. A snapshot
        ``in_checkpoints`` survives a resume, where ``brought_back`` returns it.
        """

    def brought_back(self, step: int) -> Snapshot | None:
        """The snapshot of ``step`` from the checkpoint that the run was resumed from.

        It is returned once.
        """


class Request(NamedTuple):
    """A requested change."""

    change: Change
    reason: str
    decision: int | None = None


class ControlQueue(TrainerControl):
    """The requests that wait for the step boundary; implements ``TrainerControl``.

    ``step()`` is the step of the boundary. In a run ``shared`` by several processes only requests
    that all of them agreed on are applied: a signal may reach one of them later.
    """

    def __init__(self, step: Callable[[], int], *, shared: bool = False) -> None:
        self._step = step
        self._is_shared = shared
        self._agreed: list[Request] = []
        self._keys = itertools.count()
        self._pending: list[Request] = []
        self._taken: list[Request] = []  # last: keeps their snapshots alive until applied
        self._decision: int | None = None
        self._brought_back: dict[int, Snapshot] = {}

    @contextmanager
    def deciding(self, number: int) -> Iterator[None]:
        """Assign the requests made inside to the decision ``number``."""
        self._decision = number
        try:
            yield
        finally:
            self._decision = None

    @property
    def num_waiting(self) -> int:
        """Number of requests not yet taken."""
        return len(self._pending)

    def request(self, change: Change, reason: str) -> None:
        self._pending.append(Request(change, reason, self._decision))

    def is_requested(self, kind: type[Change]) -> bool:
        """Whether a change of this kind is waiting."""
        return any(isinstance(request.change, kind) for request in self._pending)

    def snapshot(self, *, in_checkpoints: bool = False) -> Snapshot:
        snapshot = self._new_snapshot(self._step())
        self.request(TakeSnapshot(snapshot.key, in_checkpoints), "")
        return snapshot

    def recall(self, step: int) -> Snapshot:
        """The checkpoint of ``step`` as a snapshot, read at this step boundary."""
        snapshot = self._new_snapshot(step)
        self.request(RecallCheckpoint(step, snapshot.key), "")
        return snapshot

    def bring_back(self, step: int) -> Snapshot:
        """A new snapshot of ``step`` for ``brought_back``; the caller adds its state."""
        self._brought_back[step] = snapshot = self._new_snapshot(step)
        return snapshot

    def brought_back(self, step: int) -> Snapshot | None:
        return self._brought_back.pop(step, None)

    def _new_snapshot(self, step: int) -> Snapshot:
        snapshot = Snapshot(step, next(self._keys))
        # A weak reference: the queue would keep the run, and so the snapshot, alive for ever.
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
        """The waiting requests as plain values, to be sent to all processes."""
        self._taken, self._pending = self._pending, []
        return [[one.change.to_json(), one.reason, one.decision] for one in self._taken]

    def agree_on(self, requests: Sequence[Any]) -> None:
        """Accept the requests of all processes for this boundary."""
        self._agreed += [
            Request(change_from(change), reason, decision) for change, reason, decision in requests
        ]


def _forget(queue: weakref.ref[ControlQueue], key: int) -> None:
    """Free the snapshot ``key``, which is no longer referenced."""
    found = queue()
    if found is not None:
        found.request(ForgetSnapshot(key), "")
