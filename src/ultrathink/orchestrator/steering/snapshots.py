"""Which snapshots of a run are kept in memory to go back to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ultrathink.training.control import Snapshot


@dataclass
class Kept:
    """A snapshot, and where the data stood."""

    snapshot: Snapshot
    samples: int  # taken or skipped since the run began
    number: int  # of all that were taken

    @property
    def step(self) -> int:
        """The step at whose boundary it was taken."""
        return self.snapshot.step


class SnapshotRing:
    """The newest snapshots close together, older ones ever farther apart, and the best one.

    ``most`` is how many there is room for, the best one (by validation) among them.
    """

    def __init__(self, take: Callable[[], Snapshot], *, every: int, most: int) -> None:
        self.every = every
        self.most = most
        self.best: Kept | None = None
        self._take = take
        self._kept: list[Kept] = []
        self._count = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def steps(self) -> list[int]:
        """The steps that can be gone back to, the oldest first."""
        return sorted({one.step for one in self._all()})

    def is_due(self, step: int) -> bool:
        """Whether the newest one is ``every`` steps old."""
        return not self._kept or step - self._kept[-1].step >= self.every

    def take(self, samples: int, *, is_best: bool = False) -> None:
        """Take one at this step boundary."""
        if self.most < 1:
            return
        kept = Kept(self._take(), samples, self._count + 1)
        if is_best:
            self.best = kept
        if not is_best or self.is_due(kept.step):
            self._kept.append(kept)
            self._count += 1
        while len(self._all()) > self.most and len(self._kept) > 1:
            self._kept.pop(self._least_missed())

    def before(self, step: int) -> Kept | None:
        """The newest one that is not beyond ``step``."""
        return max(
            (one for one in self._all() if one.step <= step),
            key=lambda one: one.step,
            default=None,
        )

    def forget_after(self, step: int) -> None:
        """What lies beyond ``step`` belongs to a history that was undone."""
        self._kept = [one for one in self._kept if one.step <= step]
        if self.best is not None and self.best.step > step:
            self.best = None

    def _all(self) -> list[Kept]:
        extra = [self.best] if self.best is not None and self.best not in self._kept else []
        return [*self._kept, *extra]

    def _least_missed(self) -> int:
        """The place of the one, not the newest, that lies farthest beyond its time.

        Every second one is kept for a short time, every fourth for twice as long, and so on, as
        the marks of a ruler have lengths: so the ages of those that stay double.
        """
        newest = self._kept[-1].number
        overdue = [
            ((newest - one.number) / (one.number & -one.number), -place)
            for place, one in enumerate(self._kept[:-1])
        ]
        return -max(overdue)[1]
