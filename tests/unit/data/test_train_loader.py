from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.data.batches import planes
from tests.unit.data.data_helpers import store_of
from ultrathink.config.data import PackingConfig
from ultrathink.core.errors import CheckpointError, DataError
from ultrathink.data import loader as loader_module
from ultrathink.data.batch import Batch
from ultrathink.data.cache import TokenStore
from ultrathink.data.loader import TrainLoader

T = 8
B = 3


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[TokenStore]:
    folder = tmp_path_factory.mktemp("stores")
    texts = [
        [f"{name} {number} " * 3 for number in range(count)]
        for name, count in (("first", 40), ("second", 9))
    ]
    return [store_of(folder / str(number), each) for number, each in enumerate(texts)]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few batches a block, so that changes fall inside of one."""
    monkeypatch.setattr(loader_module, "_BLOCK_TOKENS", 4 * B * T)


def make(stores: list[TokenStore], **options: Any) -> TrainLoader:
    values: dict[str, Any] = {
        "weights": [2.0, 1.0],
        "seq_len": T,
        "batch_size": B,
        "packing": PackingConfig(),
        "seed": 11,
        **options,
    }
    return TrainLoader(stores, values.pop("weights"), **values)


def rows(batches: list[Batch]) -> list[list[int]]:
    """The samples of ``batches``, each with its source and all of its fields, in order."""
    stacked = torch.cat([torch.stack(planes(batch), dim=1) for batch in batches])
    result: list[list[int]] = stacked.flatten(1).tolist()
    return result


def take(loader: TrainLoader, num_batches: int) -> list[list[int]]:
    return rows([loader.next_batch() for _ in range(num_batches)])


# -- batches and epochs -------------------------------------------------------------------------


def test_batches_have_the_contracted_shape(stores: list[TokenStore]) -> None:
    batch = make(stores).next_batch()
    for field in planes(batch):
        assert field.shape == (B, T)
        assert field.dtype == torch.int64
        assert field.is_contiguous()
    assert torch.equal(batch.labels[:, :-1], batch.input_ids[:, 1:])


def test_an_epoch_brings_each_sample_once_and_the_next_in_another_order(
    stores: list[TokenStore],
) -> None:
    loader = make(stores[:1], weights=[1.0], batch_size=1)
    first, second = (take(loader, loader.num_samples) for _ in range(2))
    assert loader.num_samples == -(-(stores[0].num_tokens - 1) // T)
    targets = sum(label != -100 for row in first for label in row[T : 2 * T])
    assert targets == stores[0].num_tokens - 1
    assert sorted(first) == sorted(second)
    assert first != second


def test_the_mixture_holds_in_every_stretch(stores: list[TokenStore]) -> None:
    loader = make(stores)
    sources = np.array([row[-1] for row in take(loader, 100)])
    for begin in range(270):
        assert abs((sources[begin : begin + 30] == 0).sum() - 20) <= 1


def test_the_batch_size_does_not_change_the_order(stores: list[TokenStore]) -> None:
    assert take(make(stores, batch_size=3), 20) == take(make(stores, batch_size=5), 12)


def test_seeds_differ_and_repeat(stores: list[TokenStore]) -> None:
    assert take(make(stores), 5) == take(make(stores), 5)
    assert take(make(stores), 5) != take(make(stores, seed=12), 5)


def test_batches_are_each_their_own(stores: list[TokenStore]) -> None:
    loader = make(stores)
    first = loader.next_batch()
    before = rows([first])
    loader.next_batch().input_ids.zero_()
    assert rows([first]) == before


# -- changes ------------------------------------------------------------------------------------


def test_skip_jumps_from_the_next_sample_on(stores: list[TokenStore]) -> None:
    plain = take(make(stores), 30)
    loader = make(stores)
    got = take(loader, 2)
    loader.skip(7)
    got += take(loader, 8)
    assert got == plain[:6] + plain[13:37]
    assert (loader.samples_seen, loader.samples_skipped) == (30, 7)


def test_new_weights_hold_from_the_next_sample_on(stores: list[TokenStore]) -> None:
    plain = take(make(stores), 2)
    loader = make(stores)
    assert loader.weights == (2.0, 1.0)
    assert take(loader, 2) == plain
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
    straight = make(stores)
    expected = [row for action in actions for row in act(straight, action)]
    first = make(stores)
    got = [row for action in actions[:stop] for row in act(first, action)]
    state = json.loads(json.dumps(first.state_dict()))
    take(first, 1)  # what is read after the state was taken does not matter
    second = make(stores)
    take(second, 2)
    second.load_state_dict(state)
    got += [row for action in actions[stop:] for row in act(second, action)]
    assert got == expected
    assert take(second, 3) == take(straight, 3)
    assert second.state_dict() == straight.state_dict()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": 12}, r"run.seed 11, here it is 12"),
        ({"seq_len": 9}, r"data.seq_len 8, here it is 9"),
        ({"packing": PackingConfig(enabled=False)}, "data.packing"),
    ],
)
def test_a_state_of_other_data_is_refused_by_name(
    stores: list[TokenStore], options: dict[str, Any], words: str
) -> None:
    state = make(stores).state_dict()
    with pytest.raises(CheckpointError, match=words):
        make(stores, **options).load_state_dict(state)


def test_a_state_brings_its_weights_with_it(stores: list[TokenStore]) -> None:
    first = make(stores)
    take(first, 4)
    second = make(stores, weights=[1.0, 5.0])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.weights == (2.0, 1.0)
    assert take(second, 20) == take(first, 20)
    assert second.state_dict() == first.state_dict()


def test_the_configured_weights_apply_when_they_are_new_ones(stores: list[TokenStore]) -> None:
    loader = make(stores)
    loader.mix_by([2, 1])  # as it was made
    assert loader.state_dict()["changes"] == []
    take(loader, 2)
    loader.set_weights([0, 1])
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = make(stores)
    resumed.load_state_dict(state)
    resumed.mix_by([2, 1])  # the configuration did not change, so what was set since stays
    assert resumed.weights == (0.0, 1.0)
    resumed.mix_by([3, 1])
    assert resumed.weights == (3.0, 1.0)
    again = make(stores, weights=[3.0, 1.0])
    again.load_state_dict(json.loads(json.dumps(resumed.state_dict())))
    again.mix_by([3, 1])
    assert again.state_dict() == resumed.state_dict()


def test_a_state_of_other_sizes_is_refused(stores: list[TokenStore]) -> None:
    state = make(stores).state_dict()
    with pytest.raises(CheckpointError, match=r"numbers of samples in the sources"):
        make(stores[::-1]).load_state_dict(state)


# -- workers ------------------------------------------------------------------------------------


@pytest.fixture
def working(stores: list[TokenStore]) -> Iterator[TrainLoader]:
    loader = make(stores, num_workers=2)
    yield loader
    loader.close()


def test_workers_change_nothing(stores: list[TokenStore], working: TrainLoader) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    alone = make(stores)
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
    assert take(working, 2) == take(alone, 2)  # starts again by itself


def test_packed_alone_and_joined_differ(stores: list[TokenStore], tmp_path: Path) -> None:
    kinds = [PackingConfig(), PackingConfig(isolate_documents=False), PackingConfig(enabled=False)]
    first = [take(make(stores, packing=packing), 30) for packing in kinds]
    assert first[0] != first[1]
    assert first[1] != first[2]
    with pytest.raises(DataError, match="batch_size is 0"):
        make(stores, batch_size=0)
    empty = store_of(tmp_path / "empty", [])
    with pytest.raises(DataError, match="no samples"):
        make([empty], weights=[1.0])
