from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.data.data_helpers import store_of
from ultrathink.core.errors import DataError
from ultrathink.data.tokenizers.bpe import BpeTokenizer
from ultrathink.data.validation import ValidationSet

TEXTS = ["the first held-out document", "größer als ASCII 🙂", "x"]


@given(
    texts=st.lists(st.text(max_size=30), min_size=2, max_size=5),
    seq_len=st.integers(2, 12),
    batch_size=st.integers(1, 4),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_each_token_but_the_first_is_predicted_once(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], seq_len: int, batch_size: int
) -> None:
    store = store_of(tmp_path_factory.mktemp("store"), texts, name="mine")
    # The definition: documents joined by end-of-text tokens, one token a byte here.
    stream = [token for text in texts for token in [*text.encode(), 256]][:-1]
    if len(stream) < 2:
        with pytest.raises(DataError, match=rf"source 'mine' has {len(texts)} documents and"):
            ValidationSet([store], seq_len)
        return
    held_out = ValidationSet([store], seq_len)
    batches = list(held_out.batches(batch_size))
    inputs = torch.cat([batch.input_ids for batch in batches])
    labels = torch.cat([batch.labels for batch in batches])
    trained = labels != -100
    assert labels[trained].tolist() == stream[1:]
    assert inputs[trained].tolist() == stream[:-1]
    assert trained.sum(1).tolist()[:-1] == [seq_len] * (len(labels) - 1)
    assert held_out.extent() == (len(stream) - 1, sum(len(text.encode()) for text in texts))
    for batch in batches:
        assert batch.num_sequences <= batch_size
        assert (batch.document_ids == 0).all()
        assert (batch.positions == torch.arange(seq_len)).all()


@pytest.mark.parametrize("max_tokens", [1, 20, 40, 10_000])
def test_a_part_has_the_bytes_of_its_own_tokens(
    bpe: BpeTokenizer, tmp_path: Path, max_tokens: int
) -> None:
    seq_len = 8
    texts = [text * 3 for text in TEXTS]
    store = store_of(tmp_path / "store", texts, bpe)
    held_out = ValidationSet([store], seq_len)
    batches = list(held_out.batches(2, max_tokens))
    labels = torch.cat([batch.labels for batch in batches])
    first = batches[0].input_ids[0, 0].item()
    targets = labels[labels != -100].tolist()
    extent = held_out.extent(max_tokens)
    assert extent.num_tokens == len(targets)
    # Window 0 is always among them, and brings the first token's bytes.
    assert extent.num_bytes == len(bpe.decode_bytes([first, *targets]))
    assert len(targets) <= max(max_tokens, seq_len)
    if max_tokens == 10_000:
        assert extent == held_out.extent()
        assert extent.num_bytes == sum(len(text.encode()) for text in texts)


def test_a_part_is_spread_over_the_text(tmp_path: Path) -> None:
    text = "".join(chr(48 + number) * 100 for number in range(10))
    held_out = ValidationSet([store_of(tmp_path / "store", [text])], 10)
    seen = torch.cat([batch.labels for batch in held_out.batches(4, 100)])
    assert {chr(token) for token in seen.flatten().tolist()} == set("0123456789")


def test_each_source_is_scored_and_named_by_its_number(tmp_path: Path) -> None:
    stores = [
        store_of(tmp_path / str(number), [letter * 300]) for number, letter in enumerate("ab")
    ]
    held_out = ValidationSet(stores, 16)
    for limit in (None, 100):
        for batch in held_out.batches(8, limit):
            letters = set(batch.labels[batch.labels != -100].tolist())
            assert letters == {ord("ab"[batch.source_ids[0, 0]])}
    assert held_out.extent() == (2 * 299, 600)
