"""Which snapshots are kept."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from ultrathink.orchestrator.steering.snapshots import SnapshotRing
from ultrathink.training.snapshots import Snapshot


class Clock:
    """Takes snapshots of a run that is nothing but a step."""

    def __init__(self, *, every: int, most: int) -> None:
        self.step = 0
        self.ring = SnapshotRing(lambda: Snapshot(self.step, self.step), every=every, most=most)

    def run(self, steps: int, best: frozenset[int] = frozenset()) -> None:
        for _ in range(steps):
            self.step += 1
            if self.ring.is_due(self.step) or self.step in best:
                self.ring.take(8 * self.step, is_best=self.step in best)


@given(
    st.integers(1, 20),
    st.integers(1, 8),
    st.integers(0, 400),
    st.frozensets(st.integers(1, 400), max_size=5),
)
def test_there_are_never_too_many_and_the_newest_and_the_best_stay(
    every: int, most: int, steps: int, best: frozenset[int]
) -> None:
    clock = Clock(every=every, most=most)
    clock.run(steps, best)
    ring = clock.ring
    assert len(ring.steps) <= max(most, 2 if best else 1)
    if steps:
        newest = max([1, *range(1, steps + 1, every)])
        assert max(ring.steps) >= newest - every
    reached = [step for step in best if step <= steps]
    assert (ring.best.step if ring.best is not None else None) == max(reached, default=None)
    for step in range(0, steps + 10, 7):
        kept = ring.before(step)
        assert (kept.step if kept is not None else None) == max(
            (one for one in ring.steps if one <= step), default=None
        )


def test_older_ones_lie_farther_apart() -> None:
    clock = Clock(every=10, most=5)
    clock.run(2000)
    steps = clock.ring.steps
    gaps = [later - earlier for earlier, later in pairwise(steps)]
    assert steps[-1] == 1991
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] <= 20
    assert 2000 - steps[0] >= 80


def test_what_was_undone_is_forgotten() -> None:
    clock = Clock(every=10, most=5)
    clock.run(100, frozenset({95}))
    kept = clock.ring.before(60)
    assert kept is not None
    clock.ring.go_back_to(kept.snapshot)
    assert max(clock.ring.steps) <= 60
    assert clock.ring.best is None


def test_the_best_of_the_last_steps_has_the_lowest_loss() -> None:
    clock = Clock(every=10, most=8)
    for loss in (None, 3.0, 2.0, 2.0, 2.5):
        clock.step += 10
        clock.ring.take(0, loss=loss)
    found = {since: clock.ring.best_since(since) for since in (0, 35, 45, 51)}
    assert {since: one and one.step for since, one in found.items()} == {
        0: 40,
        35: 40,
        45: 50,
        51: None,
    }


def test_without_room_none_is_taken() -> None:
    clock = Clock(every=10, most=0)
    clock.run(100, frozenset({20}))
    assert clock.ring.steps == []
