"""Where assignments lie, against what each of them must find there."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ultrathink.model.experts.layout import Layout, lay_out, num_rows


@st.composite
def assignments(draw: st.DrawFn) -> tuple[list[list[int]], int]:
    """The experts of up to 160 tokens, and how many experts there are; that number is none."""
    num_experts = draw(st.integers(1, 9))
    per_token = draw(st.integers(1, 3))
    # Some experts are chosen often, so that others stay empty.
    expert = st.sampled_from([*range(num_experts), 0, 0, num_experts])
    token = st.lists(expert, min_size=per_token, max_size=per_token)
    tokens = draw(st.lists(token, min_size=1, max_size=20))
    return tokens * draw(st.sampled_from([1, 1, 8])), num_experts


def check(layout: Layout, flat: list[int], num_experts: int, multiple: int) -> None:
    """Everything that the rows of a product rely on."""
    place, source, ends, order = (part.tolist() for part in layout)
    counts = Counter(flat)
    assert len(source) % multiple == 0
    assert sorted(order) == list(range(num_experts))
    rows, begin = {}, 0
    for expert, end in zip(order, ends, strict=True):
        rows[expert] = range(begin, end)
        assert len(rows[expert]) % multiple == 0
        # Enough, none for an expert that is not chosen, and not many more than there are.
        assert counts[expert] <= len(rows[expert])
        assert len(rows[expert]) < counts[expert] + max(multiple, counts[expert] // 8 + 1)
        begin = end
    assert begin < len(source)  # one row is always free
    kept = [number for number, expert in enumerate(flat) if expert < num_experts]
    for number in kept:
        assert place[number] in rows[flat[number]]
        assert source[place[number]] == number
    assert len({place[number] for number in kept}) == len(kept)
    assert sum(number < len(flat) for number in source) == len(kept)
    assert all(number == len(flat) for number in source if number not in kept)
    assert all(place[n] == len(source) - 1 for n in range(len(flat)) if n not in kept)


@pytest.mark.parametrize("by_size", [False, True])
@pytest.mark.parametrize("multiple", [1, 8, 16])
@given(drawn=assignments())
@settings(max_examples=30)
def test_every_assignment_has_a_row_of_its_own_among_its_experts(
    drawn: tuple[list[list[int]], int], multiple: int, by_size: bool
) -> None:
    experts, num_experts = drawn
    layout = lay_out(torch.tensor(experts), num_experts, multiple=multiple, by_size=by_size)
    flat = [expert for token in experts for expert in token]
    # How many rows there are depends on no value, so that a compiled step has one shape.
    assert len(layout.source) == num_rows(len(flat), num_experts, multiple, by_size)
    check(layout, flat, num_experts, multiple)
    sizes = torch.diff(layout.ends, prepend=torch.zeros(1, dtype=torch.int32)).tolist()
    if by_size:
        assert sizes == sorted(sizes)
    else:
        assert sizes == [-(-flat.count(e) // multiple) * multiple for e in range(num_experts)]
        assert layout.order.tolist() == list(range(num_experts))
