"""What each of several processes reads: together the batches of one, in any order of changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.data.batches import planes
from tests.unit.data.data_helpers import store_of
from ultrathink.config.data import PackingConfig
from ultrathink.core.errors import DataError
from ultrathink.data.batch import IGNORED, Batch
from ultrathink.data.cache import TokenStore
from ultrathink.data.loader import Share, TrainLoader


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[TokenStore]:
    folder = tmp_path_factory.mktemp("stores")
    return [store_of(folder / str(n), [f"text {n} {i} " * 4 for i in range(30)]) for n in (1, 2)]


def make(stores: list[TokenStore], share: Share, num_workers: int = 0) -> TrainLoader:
    return TrainLoader(
        stores,
        [2.0, 1.0],
        seq_len=8,
        batch_size=12,
        packing=PackingConfig(),
        seed=5,
        num_workers=num_workers,
        share=share,
    )


@settings(max_examples=20)
@given(size=st.sampled_from([1, 2, 3, 4, 6, 12]), skip=st.integers(0, 40))
def test_shares_of_a_batch_make_the_batch(stores: list[TokenStore], size: int, skip: int) -> None:
    whole = make(stores, Share())
    parts = [make(stores, Share(rank, size)) for rank in range(size)]
    for number in range(5):
        if number == 2:
            for loader in (whole, *parts):
                loader.skip(skip)
        if number == 3:
            for loader in (whole, *parts):
                loader.set_weights([1.0, 3.0])
        expected = whole.next_batch()
        shares = [part.next_batch() for part in parts]
        found = torch.cat([torch.stack(planes(share)) for share in shares], dim=1)
        assert torch.equal(torch.stack(planes(expected)), found)
        assert expected.sample_ids.tolist() == list(range(12 * number, 12 * (number + 1)))
        assert torch.equal(torch.cat([share.sample_ids for share in shares]), expected.sample_ids)
        assert {part.samples_seen for part in parts} == {whole.samples_seen}


def test_a_state_of_one_share_is_that_of_any_other(stores: list[TokenStore]) -> None:
    begun = make(stores, Share(1, 2))
    for _ in range(3):
        begun.next_batch()
    on = make(stores, Share(0, 1))
    on.load_state_dict(begun.state_dict())
    straight = make(stores, Share())
    for _ in range(3):
        straight.next_batch()
    assert torch.equal(on.next_batch().input_ids, straight.next_batch().input_ids)
    assert on.order_hash() == begun.order_hash()


def test_workers_read_a_share_too(stores: list[TokenStore]) -> None:
    alone, helped = make(stores, Share(2, 3)), make(stores, Share(2, 3), num_workers=1)
    try:
        for _ in range(3):
            assert torch.equal(alone.next_batch().input_ids, helped.next_batch().input_ids)
    finally:
        helped.close()


def test_shares_that_cannot_be_equal_are_refused(stores: list[TokenStore]) -> None:
    with pytest.raises(DataError, match="batch_size = 12 cannot be divided by 5 processes"):
        make(stores, Share(0, 5))


@given(num_sequences=st.integers(1, 9), size=st.integers(1, 6))
def test_parts_of_a_validation_batch_hold_each_sequence_once(num_sequences: int, size: int) -> None:
    values = torch.arange(5 * num_sequences * 2).reshape(5, num_sequences, 2)
    batch = Batch.unstack(values, torch.arange(num_sequences))
    parts = [batch.share(rank, size) for rank in range(size)]
    assert len({part.num_sequences for part in parts}) == 1
    trained = torch.cat([part.labels for part in parts])
    kept = trained[(trained != IGNORED).all(1)]
    assert torch.equal(kept, batch.labels)
    assert sum(part.num_target_tokens for part in parts) == batch.num_target_tokens


def test_one_part_is_the_batch_itself(tmp_path: Path) -> None:
    batch = Batch.unstack(torch.zeros(5, 3, 2, dtype=torch.int64), torch.arange(3))
    assert batch.share(0, 1) is batch
