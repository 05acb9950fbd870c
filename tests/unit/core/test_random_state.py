"""Random state: what is drawn after a checkpoint is drawn again after loading it."""

import json
import random

import numpy as np
import torch

from ultrathink.core.random import (
    random_state,
    seed_everything,
    set_random_state,
    set_torch_random_state,
    torch_random_state,
)


def draw() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
        float(torch.rand(())),
        float(torch.randn(())),
    ]


def test_the_same_seed_draws_the_same() -> None:
    drawn = []
    for seed in (3, 3, 4, 2**63 - 1, 2**63 - 1):  # a large one is fine for every generator
        seed_everything(seed)
        drawn.append(draw())
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[3] == drawn[4]


def test_a_state_goes_through_plain_values_and_back() -> None:
    seed_everything(0)
    draw()  # gauss and randn make two numbers at a time, and keep the second for the next call
    assert random.getstate()[2] is not None
    assert np.random.get_state()[3] == 1
    state = random_state()
    expected = [draw(), draw()]

    plain = {name: value for name, value in state.items() if name in ("python", "numpy")}
    carried = {**state, **json.loads(json.dumps(plain))}
    seed_everything(99)
    set_random_state(carried)
    assert [draw(), draw()] == expected


def test_torchs_part_is_put_back_alone() -> None:
    seed_everything(0)
    part = torch_random_state()
    assert part.keys() <= random_state().keys()
    first, of_python = torch.rand(3), random.random()
    set_torch_random_state(part)
    assert torch.equal(torch.rand(3), first)
    assert random.random() != of_python
