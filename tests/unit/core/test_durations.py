"""Lengths of training: what may be written, and how many steps it comes to."""

import math
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultrathink.core.durations import Duration


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        (100, 100, "steps"),
        ("100", 100, "steps"),
        ("1_000 steps", 1000, "steps"),
        ("2k", 2000, "steps"),
        ("1.5k", 1500, "steps"),
        (0, 0, "steps"),
        (0.1, 0.1, "ratio"),
        (".5", 0.5, "ratio"),
        (1.0, 1.0, "ratio"),
        ("10%", 0.1, "ratio"),
        ("2M tokens", 2e6, "tokens"),
        ("1B tokens", 1e9, "tokens"),
        ("3 minutes", 3, "minutes"),
        ("1 minute", 1, "minutes"),
        ("0.5 min", 0.5, "minutes"),
    ],
)
def test_what_may_be_written(text: int | float | str, value: float, unit: str) -> None:
    duration = Duration.parse(text)
    assert duration.unit == unit
    assert duration.value == pytest.approx(value)


@pytest.mark.parametrize(
    "text",
    [True, -3, "-3", "soon", "", "3 hours", "1e3", "2.5 steps", "0.0001k", math.nan, math.inf,
     "9" * 400 + " tokens", "100 steps 3", 1.5, "1.5", "101%", -0.5, 10**400],
)  # fmt: skip
def test_what_is_refused_comes_with_what_to_write(text: int | float | str) -> None:
    with pytest.raises(
        ValueError, match=r"write steps \(100\)|share of the run is between 0 and 1"
    ):
        Duration.parse(text)


def test_steps_come_from_every_unit() -> None:
    def steps(text: int | float | str) -> int:
        return Duration.parse(text).to_steps(
            total_steps=1000, tokens_per_step=2048, seconds_per_step=0.5
        )

    assert steps(70) == 70
    assert steps(0.25) == 250
    assert steps("2048 tokens") == 1
    assert steps("2049 tokens") == 2
    assert steps("1 minute") == 120


durations = st.one_of(
    st.integers(0, 10**15).map(lambda n: Duration(n, "steps")),
    st.floats(0, 1).map(lambda x: Duration(x, "ratio")),
    st.floats(0, 1e15).map(lambda x: Duration(x, "tokens")),
    st.floats(0, 1e9).map(lambda x: Duration(x, "minutes")),
)


@given(durations)
def test_text_reads_back_as_the_same_length(duration: Duration) -> None:
    assert Duration.parse(str(duration)) == duration


@given(st.text(max_size=12))
def test_any_text_is_a_length_or_a_value_error(text: str) -> None:
    with suppress(ValueError):
        Duration.parse(text)
