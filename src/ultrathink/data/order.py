"""The order of samples: a pure function of the seed, the sample's index and a list of changes.

Shapes: N indices asked for, S sources.

Which source: a tree of Beatty splits (https://oeis.org/wiki/Beatty_sequences) follows the weights.
At each node, index i goes left when floor((i + 1) p) > floor(i p) for the left side's share p,
and becomes index floor(i p) there; the others become i - floor(i p) on the right. Every window
of indices then holds each source's share to within a few samples, and the numbers that arrive
at a source count up from 0 without a gap.

Which sample of it: the source's n-th draw is of epoch n // size, and a keyed permutation
of that epoch says which sample it is, so that each comes exactly once an epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from ultrathink.core.errors import DataError
from ultrathink.data.permutation import permute

Indices = npt.NDArray[np.int64]

_BITS = 30  # of a share: exact integer arithmetic, and an error below one sample in a billion
_ONE = 1 << _BITS


@dataclass(frozen=True)
class Change:
    """From sample ``index`` on, ``skip`` samples are left out and ``weights`` apply.

    The skipped samples are those of the weights in effect before.
    """

    index: int
    weights: tuple[float, ...] | None = None
    skip: int = 0

    def to_plain(self) -> dict[str, Any]:
        """The change as plain values for JSON."""
        return {**asdict(self), "weights": self.weights and list(self.weights)}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Self:
        """Read back what ``to_plain`` gave."""
        weights = plain["weights"]
        return cls(plain["index"], weights and tuple(weights), plain["skip"])


class Located(NamedTuple):
    """Where samples are, each ``int64 [N]``."""

    source_ids: Indices
    epochs: Indices
    positions: Indices  # which sample of its source, from 0


class SampleOrder:
    """The endless sequence of samples of a mixture.

    ``sizes`` are the samples in each source, ``weights`` their shares (any scale; 0 leaves a
    source out). A change in the list alters no sample before its index.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        seed: int,
        changes: Sequence[Change] = (),
    ) -> None:
        self.sizes = tuple(int(size) for size in sizes)
        self.weights = check_weights(weights, self.sizes)
        self.seed = int(seed)
        self._segments = [_Segment(0, 0, 0, _Mixture(self.weights), (0,) * len(self.sizes))]
        self.changes: list[Change] = []
        for change in changes:
            self.append(change)

    def append(self, change: Change) -> None:
        """Add a change; its index may not lie before the last one's."""
        last = self._segments[-1]
        if change.index < last.start or change.skip < 0:
            raise DataError(
                f"a change of the data order at sample {change.index} (skip {change.skip}) cannot "
                f"follow one at sample {last.start}: indices and skips count up."
            )
        raw = last.raw_start + (change.index - last.start) + change.skip
        mixture, mixture_start, counts = last.mixture, last.mixture_start, last.counts
        if change.weights is not None:
            counts = tuple(
                before + drawn
                for before, drawn in zip(counts, mixture.counts(raw - mixture_start), strict=True)
            )
            mixture, mixture_start = _Mixture(check_weights(change.weights, self.sizes)), raw
        self._segments.append(_Segment(change.index, raw, mixture_start, mixture, counts))
        self.changes.append(change)

    def locate(self, indices: npt.ArrayLike) -> Located:
        """The samples at global ``indices`` ``[N]``, which count from 0 and skip nothing."""
        wanted = np.asarray(indices, dtype=np.int64)
        starts = np.array([segment.start for segment in self._segments])
        of_segment = np.searchsorted(starts, wanted, side="right") - 1
        source_ids = np.empty_like(wanted)
        draws = np.empty_like(wanted)
        for number in np.unique(of_segment):
            segment = self._segments[number]
            here = of_segment == number
            raw = segment.raw_start + (wanted[here] - segment.start)
            sources, local = segment.mixture.assign(raw - segment.mixture_start)
            source_ids[here] = sources
            draws[here] = local + np.array(segment.counts, dtype=np.int64)[sources]
        sizes = np.array(self.sizes, dtype=np.int64)[source_ids]
        epochs, ranks = np.divmod(draws, sizes)
        positions = np.empty_like(wanted)
        for source in np.unique(source_ids):
            here = source_ids == source
            size = self.sizes[source]
            positions[here] = permute(ranks[here], size, (self.seed, int(source)), epochs[here])
        return Located(source_ids, epochs, positions)


@dataclass(frozen=True)
class _Segment:
    """A stretch of samples between two changes."""

    start: int  # first sample index
    raw_start: int  # the same, with skipped samples counted
    mixture_start: int  # raw index at which the weights began to apply
    mixture: _Mixture
    counts: tuple[int, ...]  # draws from each source before mixture_start


class _Mixture:
    """The tree of splits for one set of weights."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.num_sources = len(weights)
        self._root = _grow(list(range(len(weights))), weights)

    def assign(self, indices: Indices) -> tuple[Indices, Indices]:
        """The source of each index ``[N]``, and how many of that source came before it."""
        source_ids = np.empty_like(indices)
        local = np.empty_like(indices)
        pending = [(self._root, np.arange(len(indices)), indices)]
        while pending:
            node, where, values = pending.pop()
            if isinstance(node, int):
                source_ids[where] = node
                local[where] = values
                continue
            before = _share(values, node.left_share)
            goes_left = _share(values + 1, node.left_share) > before
            goes_right = ~goes_left
            pending.append((node.left, where[goes_left], before[goes_left]))
            pending.append((node.right, where[goes_right], (values - before)[goes_right]))
        return source_ids, local

    def counts(self, length: int) -> list[int]:
        """How many of the first ``length`` indices each source gets."""
        counts = [0] * self.num_sources
        pending = [(self._root, length)]
        while pending:
            node, total = pending.pop()
            if isinstance(node, int):
                counts[node] = total
                continue
            left = (total * node.left_share) >> _BITS
            pending += [(node.left, left), (node.right, total - left)]
        return counts


class _Split(NamedTuple):
    left: _Split | int  # an integer is a source
    right: _Split | int
    left_share: int  # in 2**-30


def _grow(sources: list[int], weights: Sequence[float]) -> _Split | int:
    """A tree over ``sources``, halved by number: shallow, which keeps the sum of errors small."""
    if len(sources) == 1:
        return sources[0]
    half = len(sources) // 2
    left, right = sources[:half], sources[half:]
    left_weight = sum(weights[source] for source in left)
    total = left_weight + sum(weights[source] for source in right)
    share = round(left_weight / total * _ONE) if total > 0 else 0
    if 0 < left_weight < total:
        share = min(max(share, 1), _ONE - 1)  # a tiny weight is not none
    return _Split(_grow(left, weights), _grow(right, weights), share)


def _share(values: Indices, share: int) -> Indices:
    """floor(values * share / 2**30), exact for values up to 2**60."""
    high, low = values >> _BITS, values & (_ONE - 1)
    return high * share + ((low * share) >> _BITS)


def check_weights(weights: Sequence[float], sizes: Sequence[int]) -> tuple[float, ...]:
    """``weights`` as a tuple; DataError unless each source has a usable one."""
    values = tuple(float(weight) for weight in weights)
    if len(values) != len(sizes):
        raise DataError(
            f"data.train has {len(sizes)} sources, but {len(values)} weights were given; give one "
            f"for each."
        )
    if not all(np.isfinite(value) and value >= 0 for value in values) or sum(values) <= 0:
        raise DataError(
            f"the weights of the sources are {list(values)}; they must be finite and not negative, "
            f"and one of them above 0."
        )
    for number, (value, size) in enumerate(zip(values, sizes, strict=True)):
        if value > 0 and size <= 0:
            raise DataError(
                f"source {number} of data.train has weight {value} but no samples; add text to it "
                f"or leave it out."
            )
    return values
