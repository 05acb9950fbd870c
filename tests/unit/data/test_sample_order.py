from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ultrathink.core.errors import DataError
from ultrathink.data.order import Change, SampleOrder
from ultrathink.data.permutation import permute

Weights = st.lists(st.floats(0.001, 1000), min_size=1, max_size=7)


def located(order: SampleOrder, begin: int, end: int) -> list[tuple[int, int, int]]:
    found = order.locate(np.arange(begin, end))
    return list(zip(*(field.tolist() for field in found), strict=True))


# -- permutation --------------------------------------------------------------------------------


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 10**6))
def test_each_epoch_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    ranks = np.arange(size)
    image = permute(ranks, size, (seed, 0), np.full(size, epoch))
    assert sorted(image.tolist()) == ranks.tolist()


def test_a_large_domain_needs_no_table() -> None:
    size = 10**12 + 39
    ranks = np.concatenate([np.arange(1000), np.arange(size - 1000, size)])
    image = permute(ranks, size, (1, 2), np.zeros(2000, dtype=np.int64))
    assert len(set(image.tolist())) == 2000
    assert image.min() >= 0
    assert image.max() < size
    assert 0.4 < (image < size / 2).mean() < 0.6


@pytest.mark.parametrize("size", [5, 97, 1024])
def test_permutations_are_even_and_unlike_each_other(size: int) -> None:
    num_epochs = 2000
    first = permute(np.zeros(num_epochs, dtype=np.int64), size, (3, 1), np.arange(num_epochs))
    counts = np.bincount(first % 5, minlength=5)
    expected = np.bincount(np.arange(size) % 5, minlength=5) * num_epochs / size
    assert (abs(counts - expected) < 5 * np.sqrt(expected)).all()
    # Neighbours do not stay neighbours.
    image = permute(np.arange(size), size, (3, 1), np.zeros(size, dtype=np.int64))
    steps = np.diff(image)
    assert size < 50 or Counter(steps.tolist()).most_common(1)[0][1] < size * 0.1


# -- mixture ------------------------------------------------------------------------------------


@given(weights=Weights, offset=st.integers(0, 10**12), data=st.data())
@settings(max_examples=60)
def test_shares_hold_over_any_window(weights: list[float], offset: int, data: Any) -> None:
    num_samples = 400
    order = SampleOrder([10**9] * len(weights), weights, seed=0)
    sources = order.locate(np.arange(offset, offset + num_samples)).source_ids
    shares = np.array(weights) / sum(weights)
    for source, share in enumerate(shares):
        drawn = np.concatenate([[0], np.cumsum(sources == source)])
        ideal = np.arange(num_samples + 1) * share
        excess = drawn - ideal
        # The largest deviation over all windows of all lengths within the stretch.
        assert excess.max() - excess.min() < 4
    if len(weights) == 2:
        assert excess.max() - excess.min() <= 1 + 1e-6


@given(weights=Weights)
@settings(max_examples=40)
def test_each_source_counts_up_without_a_gap(weights: list[float]) -> None:
    sizes = [7 + 10 * number for number in range(len(weights))]
    order = SampleOrder(sizes, weights, seed=5)
    seen: dict[int, list[tuple[int, int]]] = {number: [] for number in range(len(weights))}
    for source, epoch, position in located(order, 0, 600):
        seen[source].append((epoch, position))
    for source, drawn in seen.items():
        size = sizes[source]
        assert [epoch for epoch, _ in drawn] == [rank // size for rank in range(len(drawn))]
        for epoch in range(len(drawn) // size):
            part = [position for _, position in drawn[epoch * size : (epoch + 1) * size]]
            assert sorted(part) == list(range(size))


def test_a_tiny_weight_is_not_none_and_zero_leaves_a_source_out() -> None:
    order = SampleOrder([5, 5], [1e-12, 1], seed=0)
    assert order.locate(np.arange(2**30 - 3, 2**30)).source_ids.tolist() == [1, 1, 0]
    order = SampleOrder([5, 0, 5], [1, 0, 2], seed=0)
    sources = order.locate(np.arange(300)).source_ids
    assert set(sources.tolist()) == {0, 2}
    assert abs((sources == 0).sum() - 100) <= 1


@given(indices=st.lists(st.integers(0, 10**9), min_size=1, max_size=30))
def test_a_sample_depends_on_its_index_alone(indices: list[int]) -> None:
    changes = [Change(10**6, (3.0, 1.0)), Change(10**7, None, 500)]
    order = SampleOrder([50, 80], [1, 1], 9, changes)
    together = order.locate(np.array(indices))
    for number, index in enumerate(indices):
        alone = order.locate(np.array([index]))
        assert [field[0] for field in alone] == [field[number] for field in together]


def test_the_order_is_pinned() -> None:
    """Another version of NumPy, Python or the code must not reorder old runs."""
    order = SampleOrder([10, 1000], [1, 3], seed=1234)
    source_ids, epochs, positions = order.locate(np.arange(8))
    assert source_ids.tolist() == [1, 1, 1, 0, 1, 1, 1, 0]
    assert epochs.tolist() == [0] * 8
    assert positions.tolist() == [154, 766, 900, 7, 887, 40, 569, 2]


# -- changes ------------------------------------------------------------------------------------

Changes = st.lists(
    st.tuples(
        st.integers(0, 60),
        st.one_of(st.none(), st.lists(st.floats(0.1, 10), min_size=3, max_size=3)),
        st.integers(0, 40),
    ),
    max_size=5,
)


@given(steps=Changes)
@settings(max_examples=40)
def test_changes_equal_a_walk_that_applies_them_one_by_one(
    steps: list[tuple[int, list[float] | None, int]],
) -> None:
    changes, index = [], 0
    for gap, weights, skip in steps:
        index += gap
        changes.append(Change(index, None if weights is None else tuple(weights), skip))
    sizes, first_weights = [7, 30, 11], [1.0, 2.0, 3.0]
    order = SampleOrder(sizes, first_weights, 3, changes)
    length = (changes[-1].index if changes else 0) + 80

    # The slow way: a raw sequence for each set of weights, each source's draws counted by hand.
    draws = [0, 0, 0]
    assign = SampleOrder([10**9] * 3, first_weights, 0)
    raw = 0

    def draw() -> tuple[int, int]:
        nonlocal raw
        source = int(assign.locate(np.array([raw])).source_ids[0])
        raw += 1
        draws[source] += 1
        return source, draws[source] - 1

    pending = list(changes)
    expected = []
    for index in range(length):
        while pending and pending[0].index == index:
            change = pending.pop(0)
            for _ in range(change.skip):
                draw()
            if change.weights is not None:
                assign, raw = SampleOrder([10**9] * 3, change.weights, 0), 0
        source, rank = draw()
        size = sizes[source]
        [position] = permute(
            np.array([rank % size]), size, (3, source), np.array([rank // size])
        ).tolist()
        expected.append((source, rank // size, position))
    assert located(order, 0, length) == expected


@pytest.mark.parametrize(
    ("sizes", "weights", "words"),
    [
        ([5, 5], [1], "data.train has 2 sources, but 1 weights were given"),
        ([5, 5], [1, -1], "must be finite and not negative"),
        ([5, 5], [1, float("nan")], "must be finite and not negative"),
        ([5, 5], [0, 0], "one of them above 0"),
        ([5, 0], [1, 1], "source 1 of data.train has weight 1.0 but no samples"),
    ],
)
def test_weights_that_cannot_be_used(sizes: list[int], weights: list[float], words: str) -> None:
    with pytest.raises(DataError, match=words):
        SampleOrder(sizes, weights, 0)
    order = SampleOrder(sizes, [1, 0], 0)
    with pytest.raises(DataError, match=words):
        order.append(Change(0, tuple(weights)))
    assert order.changes == []


def test_changes_must_follow_each_other() -> None:
    order = SampleOrder([5], [1], 0, [Change(10, None, 1)])
    with pytest.raises(DataError, match="cannot follow one at sample 10"):
        order.append(Change(9, None, 1))
