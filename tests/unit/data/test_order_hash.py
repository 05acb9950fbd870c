"""The order of samples as behaviour: noticed when the code would bring others."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.data.data_helpers import loader_of, planes, store_of
from ultrathink.config.data import PackingConfig
from ultrathink.data import order, packing, permutation
from ultrathink.data.cache import TokenStore
from ultrathink.data.order import Change, SampleOrder
from ultrathink.data.packing import DocumentSamples, SampleReader


def test_it_follows_neither_the_cursor_nor_what_only_changes_the_pace(
    stores: list[TokenStore],
) -> None:
    loader = loader_of(stores)
    expected = loader.order_hash()
    # Pinned: the order of a run that is resumed by later code must stay.
    assert expected[:16] == "193692429278dac8"
    others = [
        loader_of(stores, batch_size=5),
        loader_of(stores, num_workers=2),
        loader_of(stores, weights=[1.0, 9.0]),
    ]
    assert [other.order_hash() for other in others] == [expected] * 3
    assert multiprocessing.active_children() == []  # no worker was started for it
    for _ in range(5):
        loader.next_batch()
    loader.skip(7)
    loader.set_weights([0, 3])
    loader.next_batch()
    assert loader.order_hash() == expected


@pytest.mark.parametrize("num_workers", [0, 1])
def test_it_disturbs_nothing(stores: list[TokenStore], num_workers: int) -> None:
    plain, hashed = loader_of(stores), loader_of(stores, num_workers=num_workers)
    for number in range(30):
        if number == 3:
            plain.skip(2)
            hashed.skip(2)
        state = hashed.state_dict()
        hashed.order_hash()
        assert hashed.state_dict() == state
        ours, theirs = planes(hashed.next_batch()), planes(plain.next_batch())
        assert [each.tolist() for each in ours] == [each.tolist() for each in theirs]
    assert len(multiprocessing.active_children()) == num_workers
    hashed.close()


def test_it_follows_all_that_decides_the_samples(stores: list[TokenStore], tmp_path: Path) -> None:
    changed = store_of(tmp_path / "changed", ["FIRST " * 9] * 60)
    loaders = [
        loader_of(stores),
        loader_of(stores, seed=12),
        loader_of(stores, seq_len=9),
        loader_of(stores, packing=PackingConfig(enabled=False)),
        loader_of(stores, packing=PackingConfig(isolate_documents=False)),
        loader_of(stores[::-1]),
        loader_of(stores[:1], weights=[1.0]),
        loader_of([changed, stores[1]]),
    ]
    hashes = [loader.order_hash() for loader in loaders]
    assert len(set(hashes)) == len(hashes)
    empty = store_of(tmp_path / "empty", [])  # a source without samples changes nothing
    assert loader_of([stores[0], empty], weights=[1.0, 0.0]).order_hash() == hashes[-2]


# -- code that does other things ----------------------------------------------------------------


def same_order_each_epoch(ranks: Any, size: int, key: tuple[int, ...], epochs: Any) -> Any:
    return permutation.permute(ranks, size, key, np.zeros_like(epochs))


def without_skip(order: SampleOrder, change: Change, append: Any = SampleOrder.append) -> None:
    append(order, replace(change, skip=0))


def shorter(samples: DocumentSamples, positions: Any, spans: Any = DocumentSamples.spans) -> Any:
    starts, lengths = spans(samples, positions)
    return starts, np.maximum(1, lengths - 1)


@pytest.mark.parametrize(
    ("changed", "name", "value"),
    [
        (permutation, "_NUM_ROUNDS", 8),
        (permutation, "_SHIFTS", tuple(np.uint64(bits) for bits in (30, 27, 32))),
        (order, "permute", same_order_each_epoch),
        (order, "_ONE", 1 << 20),
        (SampleOrder, "append", without_skip),
        (SampleReader, "_number_documents", lambda *_: None),
        (packing, "IGNORED", -1),
        (DocumentSamples, "spans", shorter),
    ],
)
def test_other_code_is_noticed(
    stores: list[TokenStore], monkeypatch: pytest.MonkeyPatch, changed: Any, name: str, value: Any
) -> None:
    is_packed = changed is not DocumentSamples
    loader = loader_of(stores, packing=PackingConfig(enabled=is_packed))
    expected = loader.order_hash()
    with monkeypatch.context() as patch:
        patch.setattr(changed, name, value)
        assert loader.order_hash() != expected
    assert loader.order_hash() == expected
