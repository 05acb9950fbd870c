"""Choosing tokens: filters, limits, and random state of its own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ultrathink.core.errors import ConfigError
from ultrathink.inference.sampling import (
    SamplingParams,
    keep_top_k,
    keep_top_p,
    limit_vocabulary,
    new_generator,
    next_token_probabilities,
    sample,
)

LOGITS = torch.tensor([0.1, 2.0, -1.0, 1.5, 0.7]).double().log_softmax(-1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; use a whole number of at least 1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        ({"temperature": -0.1}, r"temperature is -0.1; use 0 \(greedy\) or more"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": True}, "top_k is True"),
        ({"top_p": 0.0}, "top_p is 0.0; use more than 0, up to 1"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"seed": -1}, "seed is -1"),
        ({"stop": "end"}, "stop is 'end'; give a tuple of texts"),
        ({"stop": 3}, "stop is 3"),
        ({"stop": ("a", 1)}, "give a tuple of texts"),
        ({"stop": ("a", "")}, "holds an empty text"),
    ],
)
def test_values_that_cannot_be_used_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingParams(**options)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]


def test_greedy_takes_the_largest_whatever_the_filters() -> None:
    params = SamplingParams(temperature=0, top_k=2, top_p=0.1)
    assert next_token_probabilities(LOGITS, params).tolist() == [0, 1, 0, 0, 0]
    assert sample(LOGITS, params, new_generator(0)) == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_divides_the_logits(temperature: float) -> None:
    powers = [math.exp(float(x) / temperature) for x in LOGITS]
    expected = [power / sum(powers) for power in powers]
    params = SamplingParams(temperature=temperature)
    assert next_token_probabilities(LOGITS, params).tolist() == pytest.approx(expected)
    tiny, logits = SamplingParams(temperature=1e-37), torch.tensor([300.0, 299.0, -50.0])
    assert next_token_probabilities(logits, tiny).tolist() == [1, 0, 0]


@pytest.mark.parametrize(("k", "kept"), [(1, [1]), (2, [1, 3]), (4, [0, 1, 3, 4]), (99, range(5))])
def test_top_k_keeps_the_k_largest(k: int, kept: Any) -> None:
    filtered = keep_top_k(LOGITS, k)
    assert [i for i in range(5) if filtered[i] > -math.inf] == list(kept)
    assert torch.equal(filtered[list(kept)], LOGITS[list(kept)])
    assert int((keep_top_k(torch.zeros(9), k) > -math.inf).sum()) == min(k, 9)  # of equals too


@settings(max_examples=50)
@given(seed=st.integers(0, 10**6), top_p=st.floats(0.001, 1.0))
def test_top_p_keeps_the_smallest_set_that_reaches_it(seed: int, top_p: float) -> None:
    logits = torch.randn(2, 20, generator=torch.Generator().manual_seed(seed)).double() * 2
    filtered = keep_top_p(logits, top_p)
    for row, probabilities in zip(filtered, logits.softmax(-1), strict=True):
        kept = row > -math.inf
        mass = float(probabilities[kept].sum())
        assert mass >= top_p - 1e-9
        assert mass - float(probabilities[kept].min()) < top_p + 1e-9
        if not kept.all():
            assert probabilities[kept].min() >= probabilities[~kept].max()


def test_filters_apply_together_after_the_temperature() -> None:
    params = SamplingParams(temperature=2.0, top_k=3, top_p=0.7)
    powers = {i: math.exp(float(LOGITS[i]) / 2) for i in (1, 3, 4)}
    total = sum(powers.values())
    assert powers[1] / total < 0.7 < (powers[1] + powers[3]) / total
    share = powers[1] / (powers[1] + powers[3])
    expected = [0, share, 0, 1 - share, 0]
    assert next_token_probabilities(LOGITS, params).tolist() == pytest.approx(expected)


def test_ids_beyond_the_tokenizer_are_impossible() -> None:
    limited = limit_vocabulary(torch.tensor([1.0, 0.0, 9.0, 8.0]), 2)
    assert limited.tolist() == [1.0, 0.0, -math.inf, -math.inf]
    params = SamplingParams(temperature=50.0, top_k=4, top_p=0.999)
    drawn = {sample(limited, params, new_generator(seed)) for seed in range(40)}
    assert drawn == {0, 1}
    assert limit_vocabulary(limited, 4) is limited


def test_draws_follow_the_probabilities_and_the_seed() -> None:
    params = SamplingParams(temperature=1.0)
    generator, before = new_generator(3), torch.get_rng_state()
    draws = [sample(LOGITS, params, generator) for _ in range(4000)]
    shares = [draws.count(i) / 4000 for i in range(5)]
    assert shares == pytest.approx(LOGITS.exp().tolist(), abs=0.03)
    generator = new_generator(3)
    assert [sample(LOGITS, params, generator) for _ in range(50)] == draws[:50]
    assert [sample(LOGITS, params, new_generator(None)) for _ in range(50)] != draws[:50]
    assert torch.equal(before, torch.get_rng_state())
