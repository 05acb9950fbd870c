"""Shapes: B samples, T tokens in a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.data.data_helpers import ArrayStore
from ultrathink.config.data import PackingConfig
from ultrathink.data.batch import Batch
from ultrathink.data.packing import SampleReader

Documents = st.lists(st.lists(st.integers(1, 60_000), max_size=12), min_size=1, max_size=12)
SEQ_LEN = st.integers(2, 9)

ISOLATED = PackingConfig(enabled=True, isolate_documents=True)
JOINED = PackingConfig(enabled=True, isolate_documents=False)
ALONE = PackingConfig(enabled=False)


def read_all(store: ArrayStore, seq_len: int, packing: PackingConfig) -> Any:
    reader = SampleReader([store], seq_len, packing)
    num_samples = reader.samples[0].num_samples
    return reader.read(np.zeros(num_samples, dtype=np.int64), np.arange(num_samples))


def reference(
    documents: Sequence[Sequence[int]], seq_len: int, packing: PackingConfig
) -> tuple[list[list[int]], ...]:
    """The five fields, one position at a time: (token, target, position, document)."""
    if packing.enabled:
        ended = [(token, at) for at, ids in enumerate(documents) for token in [*ids, 0]]
        streams = [ended]
    else:
        streams = [[(token, 0) for token in [*ids, 0]] for ids in documents]
    rows: list[list[tuple[int, ...]]] = []
    for stream in streams:
        for begin in range(0, len(stream) - 1, seq_len):
            row: list[tuple[int, ...]] = []
            number = position = last = 0
            pairs = zip(stream[begin:], stream[begin + 1 :], strict=False)
            for (token, at), (target, _) in islice(pairs, seq_len):
                if row and packing.isolate_documents and at != last:
                    number, position = number + 1, 0
                row.append((token, target, position, number))
                last, position = at, position + 1
            rows.append(row + [(0, -100, 0, -1)] * (seq_len - len(row)))
    return tuple([[each[field] for each in row] for row in rows] for field in range(4))


@pytest.mark.parametrize("packing", [ISOLATED, JOINED, ALONE])
@given(documents=Documents, seq_len=SEQ_LEN)
def test_every_token_is_a_target_once_in_windows_that_follow_the_reference(
    packing: PackingConfig, documents: list[list[int]], seq_len: int
) -> None:
    found = read_all(ArrayStore(documents), seq_len, packing)
    expected = reference(documents, seq_len, packing)
    assert [field.tolist() for field in found[:4]] == list(expected)


def test_an_example_in_full() -> None:
    store = ArrayStore([[11, 12, 13], [21], [31, 32]])
    input_ids, labels, positions, document_ids, source_ids = read_all(store, 4, ISOLATED)
    assert input_ids.tolist() == [[11, 12, 13, 0], [21, 0, 31, 32]]
    # The end of a document is a target, and so is the first token after it.
    assert labels.tolist() == [[12, 13, 0, 21], [0, 31, 32, 0]]
    assert positions.tolist() == [[0, 1, 2, 3], [0, 1, 0, 1]]
    assert document_ids.tolist() == [[0, 0, 0, 0], [0, 0, 1, 1]]
    assert source_ids.tolist() == [[0] * 4] * 2


@given(data=st.data())
@settings(max_examples=50)
def test_rows_of_several_stores_come_in_the_order_asked(data: Any) -> None:
    stores = [ArrayStore(data.draw(Documents)) for _ in range(3)]
    packing = data.draw(st.sampled_from([ISOLATED, JOINED, ALONE]))
    reader = SampleReader(stores, 4, packing)
    filled = [number for number in range(3) if reader.samples[number].num_samples]
    if not filled:
        return
    wanted = [
        (source, data.draw(st.integers(0, reader.samples[source].num_samples - 1)))
        for source in data.draw(st.lists(st.sampled_from(filled), min_size=1, max_size=8))
    ]
    together = reader.read(*np.array(wanted, dtype=np.int64).T)
    assert together.dtype == np.int64
    for row, (source, position) in enumerate(wanted):
        alone = read_all(stores[source], 4, packing)
        assert (together[:4, row] == alone[:4, position]).all()
        assert (together[4, row] == source).all()


# -- batches ------------------------------------------------------------------------------------


def batch_of(num_sequences: int, seq_len: int) -> Batch:
    return Batch.unstack(
        torch.arange(5 * num_sequences * seq_len).reshape(5, num_sequences, seq_len),
        torch.arange(num_sequences),
    )


@given(
    num_units=st.integers(1, 6),
    unit_size=st.integers(1, 3),
    size=st.integers(1, 20),
    ranks=st.integers(1, 4),
    weighted=st.booleans(),
)
def test_micro_batches_and_shares_are_the_batch_and_never_split_a_unit(
    num_units: int, unit_size: int, size: int, ranks: int, weighted: bool
) -> None:
    """The fields of a batch of another kind are divided as all others are."""

    @dataclass(frozen=True)
    class Rewarded(Batch):
        rewards: Tensor = field(default=torch.empty(0), metadata={"dtype": torch.float32})

    num_rows = num_units * unit_size
    plain = batch_of(num_rows, 3)
    batch = Rewarded(
        **plain.tensors(),
        loss_weights=torch.rand(num_rows, 3) if weighted else None,
        rewards=torch.arange(num_rows, dtype=torch.float32),
        unit_size=unit_size,
    )
    parts = batch.split(size)
    assert all(part.num_sequences % unit_size == 0 for part in parts)
    assert all(part.num_sequences <= max(size, unit_size) for part in parts)
    shares = [batch.share(rank, ranks) for rank in range(ranks)]
    assert ranks > 1 or shares[0] is batch
    assert len({share.num_sequences for share in shares}) == 1
    assert all(share.num_sequences % unit_size == 0 for share in shares)
    assert sum(share.num_target_tokens for share in shares) == batch.num_target_tokens
    for name, whole in batch.tensors().items():
        assert torch.equal(torch.cat([part.tensors()[name] for part in parts]), whole)
        if name != "labels":
            joined = torch.cat([share.tensors()[name] for share in shares])
            assert torch.equal(joined[:num_rows], whole)
    assert ("loss_weights" in batch.tensors()) == weighted


def test_a_field_of_another_type_is_refused() -> None:
    batch = batch_of(2, 3)
    with pytest.raises(AssertionError, match=r"labels is torch\.int32, and should be torch\.int64"):
        replace(batch, labels=batch.labels.int())
    with pytest.raises(AssertionError, match="units are whole"):
        replace(batch_of(3, 3), unit_size=2)


def test_targets_are_counted_without_what_is_not_trained() -> None:
    batch = batch_of(2, 3)
    batch.labels[0, 1] = -100
    assert batch.num_target_tokens == 5
    batch.labels[:] = -100
    assert batch.num_target_tokens == 0
    ids, samples = batch.on("cpu", "input_ids", "sample_ids")
    assert (ids.shape, samples.tolist()) == ((2, 3), [0, 1])
