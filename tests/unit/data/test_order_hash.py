"""The order of samples as behaviour: noticed when the code would bring others."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
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

ROOT = Path(__file__).parents[3]


def test_it_follows_neither_the_cursor_nor_what_only_changes_the_pace(
    stores: list[TokenStore],
) -> None:
    loader = loader_of(stores)
    expected = loader.order_hash()
    assert loader.order_hash() == expected
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
    hashes = [
        loader_of(stores).order_hash(),
        loader_of(stores, seed=12).order_hash(),
        loader_of(stores, seq_len=9).order_hash(),
        loader_of(stores, packing=PackingConfig(enabled=False)).order_hash(),
        loader_of(stores, packing=PackingConfig(isolate_documents=False)).order_hash(),
        loader_of(stores[::-1]).order_hash(),
        loader_of(stores[:1], weights=[1.0]).order_hash(),
        loader_of([changed, stores[1]]).order_hash(),
    ]
    assert len(set(hashes)) == len(hashes)


def test_a_source_without_samples_changes_nothing(stores: list[TokenStore], tmp_path: Path) -> None:
    empty = store_of(tmp_path / "empty", [])
    loader = loader_of([stores[0], empty], weights=[1.0, 0.0])
    assert loader.order_hash() == loader_of(stores[:1], weights=[1.0]).order_hash()


# -- code that does other things ----------------------------------------------------------------

Patch = Callable[[pytest.MonkeyPatch], None]


def more_rounds(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(permutation, "_NUM_ROUNDS", 8)


def other_mixing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(permutation, "_SHIFTS", tuple(np.uint64(bits) for bits in (30, 27, 32)))


def same_order_each_epoch(patch: pytest.MonkeyPatch) -> None:
    def permute(ranks: Any, size: int, key: tuple[int, ...], epochs: Any) -> Any:
        return permutation.permute(ranks, size, key, np.zeros_like(epochs))

    patch.setattr(order, "permute", permute)


def other_tree(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(order, "_BITS", 20)
    patch.setattr(order, "_ONE", 1 << 20)


def forgotten_skips(patch: pytest.MonkeyPatch) -> None:
    append = SampleOrder.append

    def without_skip(self: SampleOrder, change: Change) -> None:
        append(self, Change(change.index, change.weights, 0))

    patch.setattr(SampleOrder, "append", without_skip)


def positions_that_do_not_restart(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SampleReader, "_number_documents", lambda self, values, ends: None)


def other_padding(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(packing, "IGNORED", -1)


def documents_cut_otherwise(patch: pytest.MonkeyPatch) -> None:
    spans = DocumentSamples.spans

    def shorter(self: DocumentSamples, positions: Any) -> Any:
        starts, lengths = spans(self, positions)
        return starts, np.maximum(1, lengths - 1)

    patch.setattr(DocumentSamples, "spans", shorter)


@pytest.mark.parametrize(
    ("change", "enabled"),
    [
        (more_rounds, True),
        (other_mixing, True),
        (same_order_each_epoch, True),
        (other_tree, True),
        (forgotten_skips, True),
        (positions_that_do_not_restart, True),
        (other_padding, True),
        (documents_cut_otherwise, False),
    ],
)
def test_other_code_is_noticed(
    stores: list[TokenStore], monkeypatch: pytest.MonkeyPatch, change: Patch, enabled: bool
) -> None:
    loader = loader_of(stores, packing=PackingConfig(enabled=enabled))
    expected = loader.order_hash()
    with monkeypatch.context() as patch:
        change(patch)
        assert loader.order_hash() != expected
    assert loader.order_hash() == expected


SCRIPT = """
import sys
from pathlib import Path
from ultrathink.config.data import PackingConfig
from ultrathink.data.cache import TokenStore
from ultrathink.data.loader import TrainLoader
stores = [TokenStore(Path(folder), "s") for folder in sys.argv[1:]]
print(TrainLoader(stores, [2.0, 1.0], seq_len=8, batch_size=4, packing=PackingConfig(),
                  seed=11).order_hash())
"""


def test_it_is_the_same_in_every_process(stores: list[TokenStore]) -> None:
    expected = loader_of(stores).order_hash()
    # Pinned: the order of a run that is resumed by later code must stay.
    assert expected[:16] == "193692429278dac8"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *(str(store.folder) for store in stores)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert done.stdout.strip() == expected
