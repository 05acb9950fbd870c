"""What each of several processes reads: together the batches of one, in any order of changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.data.data_helpers import loader_of, planes
from ultrathink.core.errors import DataError
from ultrathink.data.cache import TokenStore
from ultrathink.data.loader import Share


@settings(max_examples=20)
@given(size=st.sampled_from([1, 2, 3, 4, 6, 12]), skip=st.integers(0, 40))
def test_shares_of_a_batch_make_the_batch(stores: list[TokenStore], size: int, skip: int) -> None:
    whole = loader_of(stores, batch_size=12)
    parts = [loader_of(stores, batch_size=12, share=Share(rank, size)) for rank in range(size)]
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
    begun = loader_of(stores, batch_size=12, share=Share(1, 2))
    for _ in range(3):
        begun.next_batch()
    on = loader_of(stores, batch_size=12)
    on.load_state_dict(begun.state_dict())
    straight = loader_of(stores, batch_size=12)
    for _ in range(3):
        straight.next_batch()
    assert torch.equal(on.next_batch().input_ids, straight.next_batch().input_ids)
    assert on.order_hash() == begun.order_hash()


def test_shares_that_cannot_be_equal_are_refused(stores: list[TokenStore]) -> None:
    with pytest.raises(DataError, match="batch_size = 12 cannot be divided by 5 processes"):
        loader_of(stores, batch_size=12, share=Share(0, 5))
