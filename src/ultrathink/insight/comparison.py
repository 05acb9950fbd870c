"""Runs side by side: configurations, manifests and curves."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from ultrathink.config.overrides import flatten
from ultrathink.config.reflection import options_of
from ultrathink.config.schema import Config
from ultrathink.monitoring.records import MetricRecord, Split
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.reading import RunReader
from ultrathink.runs.segments import Segment

MAX_ROWS = 12
MIN_ROWS = 4
# The place and name of a run, which do not affect training.
PLACE_KEYS = frozenset(key for key, rule in options_of(Config).items() if rule.is_place)
# Entries of the manifest that differ between any two runs.
_OCCASION_KEYS = frozenset({"created", "command"})
_ROUND = (1, 1.5, 2, 3, 4, 5, 6, 8, 10)

SPLITS: tuple[Split, ...] = ("train", "val")
Axis = Literal["step", "tokens"]
Values = tuple[Any, ...]  # one for each run, in their order


@dataclass(frozen=True)
class Side:
    """One run of a comparison."""

    label: str
    path: Path
    config: dict[str, Any]  # leaves by dotted key
    manifest: dict[str, Any]
    train: tuple[MetricRecord, ...]
    val: tuple[MetricRecord, ...]
    segments: tuple[Segment, ...]

    def records(self, split: Split) -> tuple[MetricRecord, ...]:
        return self.train if split == "train" else self.val


@dataclass(frozen=True)
class Difference:
    """A key whose values differ between runs; ``ABSENT`` where a run lacks it."""

    key: str
    values: Values


class _Absent:
    """Stands for a key that a run does not have, as None is a value."""

    def __repr__(self) -> str:
        return "ABSENT"


ABSENT = _Absent()


@dataclass(frozen=True)
class Stretch:
    """A part of the steps that all runs have reached, after ``begin`` up to ``end``.

    ``train_loss`` is the mean of its logged losses, ``bits_per_byte`` that of its last validation;
    None where there was none, NaN where none was finite.
    """

    begin: int
    end: int
    train_loss: Values
    bits_per_byte: Values


@dataclass(frozen=True)
class Agreement:
    """How many of a run's losses equal those of the first run, bit for bit."""

    split: Split
    num_common: int  # steps that both logged
    num_equal: int
    same_steps: bool  # both logged the same steps
    last_equal: int | None  # the last step before the first difference
    first_difference: int | None  # step

    @property
    def is_identical(self) -> bool:
        return self.same_steps and self.num_common > 0 and self.first_difference is None


@dataclass(frozen=True)
class Figure:
    """A figure of each run."""

    name: str
    values: Values  # None where a run has none
    at: Values | None = None  # the step that each is from, for a best one

    @property
    def differences(self) -> Values:
        """Each value less the first run's, None where either lacks it."""
        first = self.values[0]
        return tuple(
            None if first is None or value is None else value - first for value in self.values
        )


@dataclass(frozen=True)
class Comparison:
    """The content of ``ultrathink compare``."""

    sides: tuple[Side, ...]
    config: tuple[Difference, ...]
    num_config_keys: int
    place_keys: tuple[str, ...]  # that differ, and are left out of ``config``
    manifest: tuple[Difference, ...]
    axis: Axis
    stretches: tuple[Stretch, ...]
    agreements: tuple[tuple[Agreement, ...], ...]  # for each run but the first, train and val
    figures: tuple[Figure, ...]
    lone_metrics: dict[str, tuple[str, ...]]  # "train grad_norm" -> the runs that have it


def read_side(run: RunFolder, label: str) -> Side:
    """Read a run; CheckpointError where its configuration cannot be read."""
    reader = RunReader(run)
    records = reader.history()
    # The rest can be compared without a manifest.
    manifest = flatten(found) if (found := reader.attempt(reader.manifest)) else {}
    return Side(
        label=label,
        path=run.path,
        config=flatten(reader.config()),
        manifest={key: manifest[key] for key in manifest if key not in _OCCASION_KEYS},
        train=tuple(record for record in records if record.split == "train"),
        val=tuple(record for record in records if record.split == "val"),
        segments=tuple(reader.attempt(reader.segments) or []),
    )


def compare(sides: Sequence[Side]) -> Comparison:
    """Compare two or more runs with the first one."""
    config = _differences([side.config for side in sides])
    axis = common_axis(sides)
    first, *others = sides
    return Comparison(
        sides=tuple(sides),
        config=tuple(item for item in config if item.key not in PLACE_KEYS),
        num_config_keys=len({key for side in sides for key in side.config}),
        place_keys=tuple(item.key for item in config if item.key in PLACE_KEYS),
        manifest=tuple(_differences([side.manifest for side in sides])),
        axis=axis,
        stretches=tuple(_stretches(sides, axis)),
        agreements=tuple(
            tuple(agreement(first, other, split) for split in SPLITS) for other in others
        ),
        figures=tuple(_figures(sides)),
        lone_metrics=_lone_metrics(sides),
    )


def common_axis(sides: Sequence[Side]) -> Axis:
    """Steps, where a step has the same number of tokens in all runs; else tokens."""
    first, *others = [{r.step: r.values.get("tokens") for r in side.train} for side in sides]
    is_same = all(
        first[step] == other[step] for other in others for step in first.keys() & other.keys()
    )
    return "step" if is_same else "tokens"


def agreement(first: Side, other: Side, split: Split) -> Agreement:
    """Compare the losses that two runs logged at the same steps, bit for bit."""
    here = {record.step: record.values.get("loss") for record in first.records(split)}
    there = {record.step: record.values.get("loss") for record in other.records(split)}
    common = sorted(here.keys() & there.keys())
    # As text a NaN is equal to itself.
    unequal = [step for step in common if repr(here[step]) != repr(there[step])]
    before = [step for step in common if not unequal or step < unequal[0]]
    return Agreement(
        split=split,
        num_common=len(common),
        num_equal=len(common) - len(unequal),
        same_steps=here.keys() == there.keys(),
        last_equal=before[-1] if before else None,
        first_difference=unequal[0] if unequal else None,
    )


def position(record: MetricRecord, axis: Axis) -> int:
    """The step or token count of a record."""
    return record.step if axis == "step" else int(record.values.get("tokens", 0))


def round_ends(end: int) -> list[int]:
    """Round numbers up to ``end``, about ``MAX_ROWS`` of them, and ``end`` itself."""
    scale = 10 ** max(0, math.floor(math.log10(end / MAX_ROWS)))
    stride = next(
        int(r * scale) for r in _ROUND if r * scale * MAX_ROWS >= end and r * scale % 1 == 0
    )
    ends = list(range(stride, end, stride))
    # A short last stretch is part of the one before.
    if ends and end - ends[-1] < stride / 4:
        ends.pop()
    return [*ends, end]


def _differences(trees: Sequence[dict[str, Any]]) -> list[Difference]:
    """The keys whose values differ, in the order of the trees."""
    found = [
        Difference(key, tuple(tree.get(key, ABSENT) for tree in trees))
        for key in _merged_keys(trees)
    ]
    return [item for item in found if any(value != item.values[0] for value in item.values[1:])]


def _merged_keys(trees: Sequence[dict[str, Any]]) -> list[str]:
    """All keys, each next to its neighbours in its tree."""
    merged: list[str] = []
    for tree in trees:
        place = 0
        for key in tree:
            if key in merged:
                place = merged.index(key)
            else:
                merged.insert(place, key)
            place += 1
    return merged


def _stretches(sides: Sequence[Side], axis: Axis) -> list[Stretch]:
    edges = [0, *_stretch_ends(sides, axis)]
    losses = [_within(side.train, edges, axis, "loss") for side in sides]
    scores = [_within(side.val, edges, axis, "bits_per_byte") for side in sides]
    return [
        Stretch(
            begin,
            end,
            tuple(mean(parts[number]) for parts in losses),
            tuple(parts[number][-1] if parts[number] else None for parts in scores),
        )
        for number, (begin, end) in enumerate(pairwise(edges))
    ]


def _stretch_ends(sides: Sequence[Side], axis: Axis) -> list[int]:
    """Places at which all runs were validated, if there are enough; else round numbers."""
    end = min(position(side.train[-1], axis) if side.train else 0 for side in sides)
    if end <= 0:
        return []
    places = [{position(record, axis) for record in side.val} for side in sides if side.val]
    common = set.intersection(*places) if places else set()
    scored = sorted(place for place in common if 0 < place <= end)
    if len(scored) < MIN_ROWS:
        return round_ends(end)
    stride = -(-len(scored) // MAX_ROWS)
    ends = scored[::-1][::stride][::-1]
    return ends if ends[-1] == end else [*ends, end]


def _within(
    records: Iterable[MetricRecord], edges: Sequence[int], axis: Axis, name: str
) -> list[list[float]]:
    """The figure ``name`` of the records in each stretch between two edges."""
    parts: list[list[float]] = [[] for _ in edges]  # the last one lies beyond
    for record in records:
        if name in record.values:
            part = max(0, bisect_left(edges, position(record, axis)) - 1)
            parts[part].append(record.values[name])
    return parts


def mean(values: Sequence[float]) -> float | None:
    """The mean of the finite values; NaN where none is, None where ``values`` is empty."""
    finite = [value for value in values if math.isfinite(value)]
    if finite:
        return math.fsum(finite) / len(finite)
    return math.nan if values else None


def _figures(sides: Sequence[Side]) -> list[Figure]:
    figures = [
        Figure(name, tuple(choose(side) for side in sides)) for name, choose in _FIGURES.items()
    ]
    for name, figure in _BEST.items():
        nothing: tuple[Any, Any] = (None, None)
        best = [
            min(finite(side.val, figure), key=lambda found: found[::-1], default=nothing)
            for side in sides
        ]
        steps, values = zip(*best, strict=True)
        figures.insert(-1, Figure(name, values, steps))
    return [figure for figure in figures if any(value is not None for value in figure.values)]


def finite(records: Sequence[MetricRecord], name: str) -> list[tuple[int, float]]:
    """The steps and values of a figure where it is finite."""
    values = [(record.step, record.values.get(name, math.nan)) for record in records]
    return [(step, value) for step, value in values if math.isfinite(value)]


def loss_of_last_tenth(train: Sequence[MetricRecord]) -> float | None:
    """The mean loss of the last tenth of the steps; NaN where none was finite."""
    if not train:
        return None
    begin = 0.9 * train[-1].step
    return mean([r.values["loss"] for r in train if r.step > begin and "loss" in r.values])


def median_speed(train: Sequence[MetricRecord]) -> float | None:
    """Tokens a second, the median of the logged steps."""
    speeds = [speed for _, speed in finite(train, "tokens_per_sec")]
    return statistics.median_high(speeds) if speeds else None


def _last(records: Sequence[MetricRecord], name: str) -> float | None:
    return records[-1].values.get(name) if records else None


_FIGURES: dict[str, Callable[[Side], float | None]] = {
    "steps": lambda side: side.train[-1].step if side.train else None,
    "tokens": lambda side: _last(side.train, "tokens"),
    "train_loss": lambda side: _last(side.train, "loss"),
    "train_loss_last_tenth": lambda side: loss_of_last_tenth(side.train),
    "val_loss": lambda side: _last(side.val, "loss"),
    "bits_per_byte": lambda side: _last(side.val, "bits_per_byte"),
    "tokens_per_sec": lambda side: median_speed(side.train),
}
_BEST = {"best_val_loss": "loss", "best_bits_per_byte": "bits_per_byte"}


def _lone_metrics(sides: Sequence[Side]) -> dict[str, tuple[str, ...]]:
    """Figures that only some of the runs with records of the split have."""
    lone = {}
    for split in SPLITS:
        noted = {
            side.label: {name for record in side.records(split) for name in record.values}
            for side in sides
            if side.records(split)
        }
        for name in sorted({name for names in noted.values() for name in names}):
            having = tuple(label for label, names in noted.items() if name in names)
            if len(having) < len(noted):
                lone[f"{split} {name}"] = having
    return lone
