"""Random state: seeds every generator in use, and saves and restores their states."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ultrathink.core.protocols import State


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators (CPU and every visible accelerator)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def step_seed(seed: int, step: int, *whose: int) -> int:
    """A reproducible seed for one purpose in one step, independent of neighbouring ones.

    ``whose`` is the rank of a process, or the bytes of a name.
    """
    return int(np.random.SeedSequence([seed, step, *whose]).generate_state(1, np.uint64)[0] >> 1)


def random_state() -> State:
    """The state of every global generator, as plain values and tensors."""
    version, keys, gauss = random.getstate()
    name, numpy_keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, list(keys), gauss],
        "numpy": [
            str(name),
            [int(k) for k in numpy_keys],
            int(position),
            int(has_gauss),
            float(cached),
        ],
        **torch_random_state(),
    }
    return state


def set_random_state(state: State) -> None:
    """Restore every global generator from what ``random_state`` returned."""
    values: dict[str, Any] = dict(state)
    version, keys, gauss = values["python"]
    random.setstate((version, tuple(keys), gauss))
    name, numpy_keys, position, has_gauss, cached = values["numpy"]
    np.random.set_state((name, np.array(numpy_keys, dtype=np.uint32), position, has_gauss, cached))
    set_torch_random_state(values)


def torch_random_state() -> dict[str, Tensor]:
    """The state of torch's generators, the only ones that a model uses; cheap to get."""
    state = {"torch": torch.get_rng_state()}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        state[f"cuda_{index}"] = torch.cuda.get_rng_state(index)
    return state


def set_torch_random_state(state: Mapping[str, Tensor]) -> None:
    """Restore torch's generators from what ``torch_random_state`` returned."""
    torch.set_rng_state(state["torch"].cpu())
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda_{index}" in state:
            torch.cuda.set_rng_state(state[f"cuda_{index}"].cpu(), index)
