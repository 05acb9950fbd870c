"""Chooses which snapshots of a run are kept in memory for rollbacks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ultrathink.core.protocols import State

if TYPE_CHECKING:
    from ultrathink.training.snapshots import Snapshot


@dataclass
class Kept:
    """A snapshot, and the position in the data."""

    snapshot: Snapshot
    samples: int  # taken or skipped since the run began
    number: int  # counted over all snapshots taken
    loss: float | None = None  # the level of the training loss then, nats, if known

    @property
    def step(self) -> int:
        return self.snapshot.step

    def is_before(self, other: Kept) -> bool:
        """Whether it belongs to the history of ``other``, or is ``other``."""
        return self.number <= other.number and self.step <= other.step


class SnapshotRing:
    """Keeps recent snapshots close together, older ones farther and farther apart, and the best.

    ``most`` is the maximum number, including the best one (by validation).
    """

    def __init__(self, take: Callable[[], Snapshot], *, every: int, most: int) -> None:
        self.every = every
        self.most = most
        self.best: Kept | None = None
        self.held: dict[str, Kept] = {}  # kept for rules, by the name of the purpose
        self._take = take
        self._kept: list[Kept] = []
        self._count = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def steps(self) -> list[int]:
        """The steps of the snapshots, the oldest first."""
        return sorted({one.step for one in self._all()})

    @property
    def first(self) -> Kept | None:
        return min(self._all(), key=lambda one: one.number, default=None)

    def is_due(self, step: int) -> bool:
        """Whether the newest one is ``every`` steps old."""
        return not self._kept or step - self._kept[-1].step >= self.every

    def take(self, samples: int, *, is_best: bool = False, loss: float | None = None) -> None:
        """Take a snapshot at this step boundary; the training loss is about ``loss``."""
        if self.most < 1:
            return
        kept = Kept(self._take(), samples, self._count + 1, loss)
        if is_best:
            self.best = kept
        if not is_best or self.is_due(kept.step):
            self._kept.append(kept)
            self._count += 1
        while len(self._all()) > self.most and len(self._kept) > 1:
            self._kept.pop(self._least_missed())

    def hold(self, name: str, samples: int) -> None:
        """Take a snapshot at this step boundary and keep it until it is released."""
        self._count += 1
        self.held[name] = Kept(self._take(), samples, self._count)

    def before(self, step: int) -> Kept | None:
        """The newest snapshot not after ``step``."""
        return max(
            (one for one in self._all() if one.step <= step),
            key=lambda one: one.step,
            default=None,
        )

    def best_since(self, step: int) -> Kept | None:
        """The snapshot not before ``step`` with the lowest loss, the newest of equals."""
        return min(
            (one for one in self._all() if one.step >= step),
            key=lambda one: (math.inf if one.loss is None else one.loss, -one.step),
            default=None,
        )

    def of(self, snapshot: Snapshot) -> Kept | None:
        return next((one for one in self._all() if one.snapshot == snapshot), None)

    def older_than(self, step: int) -> list[Kept]:
        """One snapshot of each step before ``step``, the oldest first."""
        found = {one.step: one for one in reversed(self._all()) if one.step < step}
        return [found[step] for step in sorted(found)]

    def go_back_to(self, snapshot: Snapshot) -> None:
        """Forget the later snapshots, which belong to undone steps."""
        kept = self.of(snapshot)
        if kept is None:  # not from this ring
            older = (one.number for one in self._all() if one.snapshot.key < snapshot.key)
            kept = Kept(snapshot, 0, max(older, default=0))
        self._kept = [one for one in self._kept if one.is_before(kept)]
        if self.best is not None and not self.best.is_before(kept):
            self.best = None

    def state_dict(self) -> State:
        """The entries, without the states of the snapshots."""
        return {
            "most": self.most,
            "count": self._count,
            "kept": [_noted(one) for one in self._kept],
            "best": None if self.best is None else _noted(self.best),
            "held": {name: _noted(one) for name, one in self.held.items()},
        }

    def load_state_dict(self, state: State, held: Callable[[int], Snapshot | None]) -> None:
        """Restore what ``state_dict`` returned, for the steps of which ``held`` has a snapshot."""
        values: dict[str, Any] = dict(state)
        best, holding = values["best"], values["held"]
        found: dict[int, Kept] = {}
        best_ones = [best] if best is not None else []
        for step, samples, number, loss in [*values["kept"], *best_ones, *holding.values()]:
            snapshot = held(step) if step not in found else None
            if snapshot is not None:
                found[step] = Kept(snapshot, samples, number, loss)
        self._kept = [found[step] for step, *_ in values["kept"] if step in found]
        self.best = found.get(best[0]) if best is not None else None
        self.held = {name: found[step] for name, (step, *_) in holding.items() if step in found}
        self._count = values["count"]

    def _all(self) -> list[Kept]:
        found = list(self._kept)
        for one in (self.best, *self.held.values()):
            if one is not None and one not in found:
                found.append(one)
        return found

    def _least_missed(self) -> int:
        """The index of the snapshot, except the newest, that most exceeds its lifetime.

        Every second one is kept for a short time, every fourth for twice as long, and so on, like
        the marks of a ruler, so that the ages of the remaining ones double.
        """
        newest = self._kept[-1].number
        overdue = [
            ((newest - one.number) / (one.number & -one.number), -place)
            for place, one in enumerate(self._kept[:-1])
        ]
        return -max(overdue)[1]


def _noted(kept: Kept) -> list[int | float | None]:
    return [kept.step, kept.samples, kept.number, kept.loss]
