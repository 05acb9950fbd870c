from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.data.data_helpers import loader_of, planes, store_of
from ultrathink.config.data import PackingConfig
from ultrathink.core.errors import CheckpointError, DataError
from ultrathink.data import loader as loader_module
from ultrathink.data.batch import Batch
from ultrathink.data.cache import TokenStore
from ultrathink.data.loader import Share, TrainLoader


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few batches a block, so that changes fall inside of one."""
    monkeypatch.setattr(loader_module, "_BLOCK_TOKENS", 4 * 3 * 8)


def rows(batches: list[Batch]) -> list[list[int]]:
    """The samples of ``batches``, each with its source and all of its fields, in order."""
    stacked = torch.cat([torch.stack(planes(batch), dim=1) for batch in batches])
    result: list[list[int]] = stacked.flatten(1).tolist()
    return result


def take(loader: TrainLoader, num_batches: int) -> list[list[int]]:
    return rows([loader.next_batch() for _ in range(num_batches)])


# -- batches and epochs -------------------------------------------------------------------------


def test_batches_have_the_contracted_shape(stores: list[TokenStore]) -> None:
    loader = loader_of(stores)
    batch = loader.next_batch()
    for field in planes(batch):
        assert field.shape == (3, 8)
        assert field.dtype == torch.int64
        assert field.is_contiguous()
    assert torch.equal(batch.labels[:, :-1], batch.input_ids[:, 1:])
    before = rows([batch])
    loader.next_batch().input_ids.zero_()
    assert rows([batch]) == before


def test_an_epoch_brings_each_sample_once_and_the_next_in_another_order(
    stores: list[TokenStore],
) -> None:
    loader = loader_of(stores[:1], weights=[1.0], batch_size=1)
    first, second = (take(loader, loader.num_samples) for _ in range(2))
    assert loader.num_samples == -(-(stores[0].num_tokens - 1) // 8)
    targets = sum(label != -100 for row in first for label in row[8:16])
    assert targets == stores[0].num_tokens - 1
    assert sorted(first) == sorted(second)
    assert first != second


def test_the_batch_size_does_not_change_the_order(stores: list[TokenStore]) -> None:
    assert take(loader_of(stores, batch_size=3), 20) == take(loader_of(stores, batch_size=5), 12)


# -- changes ------------------------------------------------------------------------------------


def test_changes_hold_from_the_next_sample_on(stores: list[TokenStore]) -> None:
    plain = take(loader_of(stores), 30)
    loader = loader_of(stores)
    assert loader.weights == (2.0, 1.0)
    got = take(loader, 2)
    loader.skip(7)
    assert got + take(loader, 8) == plain[:6] + plain[13:37]
    assert (loader.samples_seen, loader.samples_skipped) == (30, 7)
    loader.set_weights([0, 5])
    assert loader.weights == (0.0, 5.0)
    assert {row[-1] for row in take(loader, 4)} == {1}
    loader.set_weights([1, 0])
    assert {row[-1] for row in take(loader, 4)} == {0}
    with pytest.raises(DataError, match="2 sources, but 1 weights"):
        loader.set_weights([1])
    with pytest.raises(DataError, match="cannot skip -1 samples"):
        loader.skip(-1)


Actions = st.lists(
    st.one_of(
        st.just(("next", 0)),
        st.just(("next", 0)),
        st.tuples(st.just("skip"), st.integers(0, 9)),
        st.tuples(st.just("weights"), st.integers(1, 9)),
    ),
    max_size=14,
)


def act(loader: TrainLoader, action: tuple[str, int]) -> list[list[int]]:
    kind, amount = action
    if kind == "next":
        return take(loader, 1)
    if kind == "skip":
        loader.skip(amount)
    else:
        loader.set_weights([amount, 3])
    return []


@given(actions=Actions, data=st.data())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_resumed_loader_goes_on_as_if_never_stopped(
    stores: list[TokenStore], actions: list[tuple[str, int]], data: Any
) -> None:
    stop = data.draw(st.integers(0, len(actions)))
    straight = loader_of(stores)
    expected = [row for action in actions for row in act(straight, action)]
    first = loader_of(stores)
    got = [row for action in actions[:stop] for row in act(first, action)]
    state = json.loads(json.dumps(first.state_dict()))
    take(first, 1)  # what is read after the state was taken does not matter
    second = loader_of(stores, [1.0, 5.0])  # the state brings its own
    take(second, 2)
    second.load_state_dict(state)
    got += [row for action in actions[stop:] for row in act(second, action)]
    assert got == expected
    assert take(second, 3) == take(straight, 3)
    assert second.state_dict() == straight.state_dict()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": 12}, r"run.seed 11, and here it is 12"),
        ({"seq_len": 9}, r"data.seq_len 8, and here it is 9"),
        ({"packing": PackingConfig(enabled=False)}, "data.packing"),
        ({"turned": True}, "numbers of samples in the sources"),
    ],
)
def test_a_state_of_other_data_is_refused_by_name(
    stores: list[TokenStore], options: dict[str, Any], words: str
) -> None:
    state = loader_of(stores).state_dict()
    other = stores[::-1] if options.pop("turned", False) else stores
    with pytest.raises(CheckpointError, match=words):
        loader_of(other, **options).load_state_dict(state)


def test_what_gives_no_batches_is_refused(stores: list[TokenStore], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="batch_size is 0"):
        loader_of(stores, batch_size=0)
    with pytest.raises(DataError, match="batch_size = 12 cannot be divided by 5 processes"):
        loader_of(stores, batch_size=12, share=Share(0, 5))
    with pytest.raises(DataError, match="no samples"):
        loader_of([store_of(tmp_path / "empty", [])])


def test_the_configured_weights_apply_when_they_are_new_ones(stores: list[TokenStore]) -> None:
    loader = loader_of(stores)
    loader.mix_by([2, 1])  # as it was made
    assert loader.state_dict()["changes"] == []
    take(loader, 2)
    loader.set_weights([0, 1])
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = loader_of(stores)
    resumed.load_state_dict(state)
    resumed.mix_by([2, 1])  # the configuration did not change, so what was set since stays
    assert resumed.weights == (0.0, 1.0)
    resumed.mix_by([3, 1])
    assert resumed.weights == (3.0, 1.0)
    again = loader_of(stores, weights=[3.0, 1.0])
    again.load_state_dict(json.loads(json.dumps(resumed.state_dict())))
    again.mix_by([3, 1])
    assert again.state_dict() == resumed.state_dict()


# -- shares -------------------------------------------------------------------------------------


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.sampled_from([1, 2, 3, 4, 6, 12]), actions=Actions)
def test_shares_of_a_batch_make_the_batch(
    stores: list[TokenStore], size: int, actions: list[tuple[str, int]]
) -> None:
    whole = loader_of(stores, batch_size=12)
    parts = [loader_of(stores, batch_size=12, share=Share(rank, size)) for rank in range(size)]
    for action in [*actions, ("next", 0)]:
        rows = [act(part, action) for part in parts]
        assert act(whole, action) == [row for share in rows for row in share]
    ids = torch.cat([part.next_batch().sample_ids for part in parts]).tolist()
    assert whole.next_batch().sample_ids.tolist() == ids
    assert ids == list(range(whole.samples_seen - 12, whole.samples_seen))
    resumed = loader_of(stores, batch_size=12)  # a state of one share is that of any other
    resumed.load_state_dict(parts[-1].state_dict())
    assert take(resumed, 1) == take(whole, 1)


# -- workers ------------------------------------------------------------------------------------


@pytest.fixture
def working(stores: list[TokenStore]) -> Iterator[TrainLoader]:
    loader = loader_of(stores, num_workers=2, share=Share(1, 3))
    yield loader
    loader.close()


def test_workers_change_nothing(stores: list[TokenStore], working: TrainLoader) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    alone = loader_of(stores, share=Share(1, 3))
    for loader in (alone, working):
        loader.skip(2)
    assert take(working, 9) == take(alone, 9)
    for loader in (alone, working):  # in the middle of a block, with more read ahead
        loader.skip(5)
        loader.set_weights([1, 4])
    assert take(working, 9) == take(alone, 9)
    assert working.state_dict() == alone.state_dict()
    for worker in multiprocessing.active_children():  # Ctrl-C reaches them too
        os.kill(worker.pid or 0, signal.SIGINT)
    state = alone.state_dict()
    expected = take(alone, 6)
    take(working, 2)
    working.load_state_dict(state)
    assert take(working, 6) == expected
    assert torch.equal(torch.get_rng_state(), before)

    assert len(multiprocessing.active_children()) == 2
    working.close()
    deadline = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert multiprocessing.active_children() == []
    assert take(working, 2) == take(alone, 2)  # restarts by itself
