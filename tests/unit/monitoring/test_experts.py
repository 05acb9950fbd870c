"""The figures of experts, against counting token by token, and what holds for any load."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.monitoring.routed import Routed, routed, statistics, with_loads
from ultrathink.monitoring.experts import ExpertRecord, ExpertStatistics, gini_of_noise


def figures(tokens: Routed) -> dict[str, float]:
    (values,) = statistics({"g": tokens}).figures.values()
    return {name: float(value) for name, (value,) in values.items()}


def counted(tokens: Routed) -> dict[str, float]:
    """Every figure from its definition, in plain numbers."""
    T, N = tokens.chosen.shape
    k = tokens.top_k
    n = [sum(bool(tokens.chosen[t, i]) for t in range(T)) for i in range(N)]
    m = [sum(bool(tokens.kept[t, i]) for t in range(T)) for i in range(N)]
    p = tokens.probabilities.tolist()
    mean = sum(n) / N
    entropy = sum(-sum(q * math.log(q) for q in row) for row in p) / T
    return {
        "entropy": entropy,
        "entropy_normalized": entropy / math.log(N),
        "confidence": sum(max(row) for row in p) / T,
        "k_max": max(n) / T,
        "k_rel": max(n) / T / (k / N),
        "s_rel": max(sum(row[i] for row in p) / T for i in range(N)) / (1 / N),
        "load_variance": sum((x / T - mean / T) ** 2 for x in n) / N,
        "max_exp_multi": max(m) / (sum(m) / N),
        "gini": sum(abs(x - y) for x in n for y in n) / (2 * N * sum(n)),
        "utilization": mean / max(n),
        "balance_score": 1 - math.sqrt(sum((x - mean) ** 2 for x in n) / N) / mean,
        "max_min": max(n) / max(1, min(n)),
        "capacity_utilization": sum(min(x, k * T / N) for x in m) / (k * T),
        "experts_per_token": sum(m) / T,
        "dropped": sum(n) - sum(m),
        "dead": sum(x == 0 for x in n),
    }


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("N", "k", "T"), [(8, 1, 50), (8, 2, 300), (16, 2, 40), (5, 4, 33)])
def test_figures_are_what_counting_token_by_token_gives(N: int, k: int, T: int, seed: int) -> None:
    tokens = routed(seed, N, k, T, skew=0.5 * seed)
    found, expected = figures(tokens), counted(tokens)
    assert found.pop("gini_of_noise") == gini_of_noise(N, k, T)
    assert found == pytest.approx(expected, rel=1e-12)
    if (N, seed) == (16, 3):  # the tokens leave nothing out
        assert min(expected["dead"], expected["dropped"]) > 0
        assert expected["max_min"] > 5
        assert expected["capacity_utilization"] < expected["experts_per_token"] / 2 < 1


@pytest.mark.parametrize(
    ("N", "k", "T"),
    [(64, 2, 2048), (32, 2, 512), (16, 1, 300), (8, 1, 500), (8, 2, 64), (4, 3, 99)],
)
def test_the_gini_of_noise_is_that_of_random_choices(N: int, k: int, T: int) -> None:
    rng = np.random.default_rng(0)
    trials = 400 if T * N < 20_000 else 60
    found = []
    for _ in range(trials):
        chosen = rng.random((T, N)).argsort(1)[:, :k]  # k of N, without replacement
        loads = np.bincount(chosen.ravel(), minlength=N)
        pairs = itertools.product(loads.tolist(), repeat=2)
        found.append(sum(abs(x - y) for x, y in pairs) / (2 * N * k * T))
    assert gini_of_noise(N, k, T) == pytest.approx(float(np.mean(found)), rel=0.03)


# -- whatever the loads ---------------------------------------------------------------------------

sizes = st.tuples(st.integers(1, 12), st.integers(1, 12)).map(lambda pair: (max(pair), min(pair)))
tokens_of = st.builds(
    lambda seed, size, T, skew, drop: routed(seed, *size, T, skew, drop),
    st.integers(0, 2**32 - 1),
    sizes,
    st.integers(0, 40),
    st.floats(0, 20),
    st.sampled_from([0.0, 0.3, 1.0]),
)


@given(tokens_of)
def test_every_figure_is_finite_and_within_its_bounds(tokens: Routed) -> None:
    T, N = tokens.chosen.shape
    k, none = tokens.top_k, T == 0
    found = figures(tokens)
    nothing_taken = not tokens.kept.any()
    bounds = {
        "entropy": (0, math.log(N)),
        "entropy_normalized": (0, 1),
        "confidence": (0 if none else 1 / N, 1),
        "k_max": (0 if none else k / N, 1),
        "k_rel": (0 if none else 1, N / k),
        "s_rel": (0 if none else 1, N),
        "load_variance": (0, 0.25),
        "max_exp_multi": (0 if nothing_taken else 1, N),
        "gini": (0, 1 - 1 / N),
        "gini_of_noise": (0, 1 - 1 / N),
        "utilization": (0 if none else k / N, 1),
        "balance_score": (1 - math.sqrt(N - 1), 1),
        "max_min": (0 if none else 1, max(1, T)),
        "capacity_utilization": (0, 1),
        "experts_per_token": (0, k),
        "dropped": (0, k * T),
        "dead": (0, N - k),
    }
    assert found.keys() == bounds.keys()
    for name, (low, high) in bounds.items():
        assert low - 1e-9 <= found[name] <= high + 1e-9, (name, found[name])


@given(sizes, st.integers(1, 50))
def test_even_loads_are_as_good_as_can_be(size: tuple[int, int], each: int) -> None:
    N, k = size
    given = with_loads([float(k * each)] * N, num_tokens=N * each, top_k=k)
    found = {name: float(value) for name, (value,) in given.figures["skill"].items()}
    best = {"k_max": k / N, "experts_per_token": k}
    best |= dict.fromkeys(("load_variance", "gini", "dropped", "dead"), 0)
    ones = ("k_rel", "max_exp_multi", "utilization", "balance_score", "max_min")
    best |= dict.fromkeys((*ones, "capacity_utilization"), 1)
    assert {name: found[name] for name in best} == pytest.approx(best, abs=1e-12)


# -- layers and groups ----------------------------------------------------------------------------


LAYERS = [
    {"knowledge": routed(seed, 16, 2, 60), "safety": routed(seed + 9, 4, 1, 60)} for seed in (1, 2)
]


@pytest.fixture
def two_layers() -> ExpertStatistics:
    return statistics(*LAYERS)


def test_layers_and_groups_are_kept_apart(two_layers: ExpertStatistics) -> None:
    found = two_layers.figures
    assert list(found) == ["knowledge", "safety"]
    for number, layer in enumerate(LAYERS):
        for name, tokens in layer.items():
            here = {figure: values[number].item() for figure, values in found[name].items()}
            here.pop("gini_of_noise")
            assert here == pytest.approx(counted(tokens), rel=1e-12)


def test_empty_slots_are_no_experts() -> None:
    """Also where one layer has more experts of a group than another."""
    whole = statistics({"a": routed(1, 6, 2, 50)}, {"a": routed(2, 6, 2, 50)})
    small = statistics({"a": routed(3, 4, 2, 50)})
    wide = {
        name: np.concatenate([getattr(whole, name), np.pad(getattr(small, name), ((0, 0), (1, 1)))])
        for name in ("load", "dropped", "probability", "active")
    }
    given = replace(
        whole,
        layers=(0, 1, 2),
        entropy=np.concatenate([whole.entropy, small.entropy]),
        confidence=np.concatenate([whole.confidence, small.confidence]),
        **wide,
    )
    for name, values in given.figures["a"].items():
        parts = (whole.figures["a"][name], small.figures["a"][name])
        assert values.tolist() == np.concatenate(parts).tolist(), name
    loads = ExpertRecord(1, 0.0, given).to_json()["groups"]["a"]["load"]
    assert loads[2][0] is loads[2][5] is None
    assert loads[2][1:5] == small.load[0].tolist()


def test_a_summary_has_a_few_figures_of_each_group(two_layers: ExpertStatistics) -> None:
    given = two_layers
    found = given.summary()
    assert len(found) == 14
    for group, of_layers in given.figures.items():
        mean = {name: of_layers[name].mean() for name in
                ("entropy_normalized", "confidence", "utilization")}  # fmt: skip
        worst = {name: of_layers[name].max() for name in ("gini", "max_exp_multi")}
        total = {name: of_layers[name].sum() for name in ("dead", "dropped")}
        expected = {f"experts/{group}/{k}": v for k, v in {**mean, **worst, **total}.items()}
        here = {name: value for name, value in found.items() if f"/{group}/" in name}
        assert here == pytest.approx(expected, rel=1e-5)
        assert isinstance(here[f"experts/{group}/dropped"], int)
    assert found["experts/knowledge/dropped"] > 0


def test_a_record_as_json_has_everything(two_layers: ExpertStatistics) -> None:
    given = two_layers
    line = json.loads(json.dumps(ExpertRecord(7, 12.5, given).to_json(), allow_nan=False))
    assert {name: line[name] for name in ("step", "time", "num_tokens", "layers")} == {
        "step": 7, "time": 12.5, "num_tokens": 60, "layers": [1, 3],
    }  # fmt: skip
    assert list(line["groups"]) == ["knowledge", "safety"]
    for group in given.groups:
        shown = line["groups"][group.name]
        assert shown.pop("load") == given.load[:, group.slots].tolist()
        for name, values in given.figures[group.name].items():
            assert shown.pop(name) == pytest.approx(values.tolist(), rel=1e-5)
        assert shown == {}


def test_what_is_not_finite_becomes_null_and_counts_stay_whole() -> None:
    given = with_loads([1234567.0, 0.0], num_tokens=1234567)
    given.entropy[0] = math.nan
    line = ExpertRecord(1, 0.0, given).to_json()
    text = json.dumps(line, allow_nan=False)
    assert line["groups"]["skill"]["entropy"] == [None]
    assert line["groups"]["skill"]["load"] == [[1234567, 0]]
    assert '"dead": [1]' in text
    assert math.isnan(given.summary()["experts/skill/entropy_normalized"])
