"""Small models and inputs for the tests of the model package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor

from ultrathink.config.model import ModelConfig
from ultrathink.model.transformer import Transformer

MakeModel: TypeAlias = Callable[..., Transformer]

VOCAB = 53
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
    "init": {"std": 0.2},  # large enough that attention is not uniform
}


@torch.no_grad()
def assert_causal(model: Transformer, tokens: Tensor, packed: Any, is_packed: bool) -> None:
    """A token changes no logit before it, and its own."""
    documents, positions, _ = packed
    options = {"document_ids": documents, "positions": positions} if is_packed else {}
    before = model(tokens, **options).logits
    for at in (1, 7, 16, 23, 39):
        changed = tokens.clone()
        changed[:, at] = (changed[:, at] + 1) % VOCAB
        after = model(changed, **options).logits
        torch.testing.assert_close(after[:, :at], before[:, :at], rtol=0, atol=1e-12)
        assert (after[:, at] - before[:, at]).abs().max() > 1e-3


@pytest.fixture
def make_model() -> MakeModel:
    """Builds a tiny Transformer; keyword arguments change its configuration."""

    def make(*, dtype: torch.dtype = torch.float32, backend: str = "sdpa", **changes: Any) -> Any:
        model = Transformer(ModelConfig.model_validate(TINY | changes)).to(dtype)
        model.set_attention_backend(backend)
        return model

    return make


@pytest.fixture
def tokens() -> Tensor:
    """Two sequences of 40 tokens, a length that four blocks of queries do not divide evenly."""
    return torch.randint(0, VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def packed(tokens: Tensor) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """Document ids, restarted positions and the spans of three documents in ``tokens``."""
    spans = [(0, 7), (7, 24), (24, 40)]
    ids = torch.cat([torch.full((b - a,), i) for i, (a, b) in enumerate(spans)])
    positions = torch.cat([torch.arange(b - a) for a, b in spans])
    return ids.expand_as(tokens), positions.expand_as(tokens), spans
