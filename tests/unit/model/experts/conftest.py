from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.unit.model.conftest import VOCAB


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """Eight sequences of 24 tokens, of which ever fewer are trained on."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, VOCAB, (8, 24), generator=generator)
    labels = tokens.roll(-1, 1)
    labels[:, -1] = -100
    for row in range(8):
        labels[row, : 2 * row] = -100
    return tokens, labels
