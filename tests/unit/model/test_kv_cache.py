"""Decoding with a cache equals the full forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ultrathink.core.errors import ConfigError, UltrathinkError
from ultrathink.model.cache import CacheFullError
from ultrathink.model.compute_path import ComputePath


@pytest.mark.parametrize("backend", ["sdpa", "blocks", "eager"])
@pytest.mark.parametrize("pieces", [[1] * 40, [17, 1, 1, 20, 1], [40], [3, 37]])
@pytest.mark.parametrize("path", [None, ComputePath(layers=(0, 1.0))])
@torch.no_grad()
def test_pieces_equal_the_full_pass(
    make_model: Any, tokens: Tensor, backend: str, pieces: list[int], path: ComputePath | None
) -> None:
    model = make_model(backend=backend, dtype=torch.float64, num_layers=3, qk_norm=True).eval()
    expected = model(tokens, path=path).logits
    if path is not None:
        assert (expected - model(tokens).logits).abs().max() > 1e-3
    cache = model.new_cache(batch_size=2, max_length=40)
    logits = [model(piece, cache=cache, path=path).logits for piece in tokens.split(pieces, dim=1)]
    assert cache.length == 40
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_padded_batch_decodes_like_its_rows(make_model: Any, tokens: Tensor, side: str) -> None:
    model = make_model(dtype=torch.float64).eval()
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, slice(0, 8) if side == "left" else slice(12, 20)] = False
    prompt, following = tokens[:, :20], tokens[:, 20:26]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = model.new_cache(2, 26)
    model(prompt, attention_mask=mask, positions=positions, cache=cache)
    seen = mask
    for step in range(6):
        seen = torch.cat((seen, torch.ones(2, 1, dtype=torch.bool)), 1)
        logits = model(
            following[:, step : step + 1],
            attention_mask=seen,
            positions=(seen.sum(1, keepdim=True) - 1),
            cache=cache,
        ).logits
        for row in range(2):
            alone = torch.cat((prompt[row][mask[row]], following[row, : step + 1]))[None]
            expected = model(alone).logits[:, -1]
            torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_full_cache_is_an_error_and_stays_usable(make_model: Any, tokens: Tensor) -> None:
    model = make_model().eval()
    cache = model.new_cache(2, 10)
    model(tokens[:, :8], cache=cache)
    with pytest.raises(CacheFullError, match=r"8 of 10 positions and 3 more.*max_length=11"):
        model(tokens[:, 8:11], cache=cache)
    assert isinstance(CacheFullError("x"), ValueError)
    logits = model(tokens[:, 8:10], cache=cache).logits
    torch.testing.assert_close(logits, model(tokens[:, :10]).logits[:, 8:])
    cache.reset()
    logits = model(tokens[:, :10], cache=cache).logits
    torch.testing.assert_close(logits, model(tokens[:, :10]).logits)


@torch.no_grad()
def test_a_cache_serves_one_batch_and_one_path(make_model: Any, tokens: Tensor) -> None:
    model = make_model().eval()
    cache = model.new_cache(2, 10)
    with pytest.raises(UltrathinkError, match="holds 2 sequences, the input has 1"):
        model(tokens[:1, :3], cache=cache)
    model(tokens[:, :3], cache=cache, path=ComputePath(layers=(0,)))
    with pytest.raises(UltrathinkError, match=r"layers \[0\] and cannot serve layers \[0, 1\]"):
        model(tokens[:, 3:4], cache=cache)
    with pytest.raises(UltrathinkError, match="max_length of at least 1, not 2 and 0"):
        model.new_cache(2, 0)
    with pytest.raises(ValueError, match="document_ids cannot be used with a cache"):
        model(tokens, document_ids=tokens, cache=model.new_cache(2, 40))


def test_a_cache_follows_the_model(make_model: Any) -> None:
    model = make_model(dtype=torch.float32)
    assert model.new_cache(1, 4).keys[0].dtype == torch.float32
    model.compute_dtype = torch.bfloat16
    cache = model.new_cache(1, 4)
    assert cache.keys[0].dtype == cache.values[1].dtype == torch.bfloat16
    assert cache.keys[0].shape == (1, 2, 4, 8)


@torch.no_grad()
def test_last_only_gives_the_last_logits(make_model: Any, tokens: Tensor) -> None:
    model = make_model().eval()
    logits = model(tokens, last_only=True).logits
    torch.testing.assert_close(logits, model(tokens).logits[:, -1:])


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, (0, 1, 2, 3)),
        ((0, 3), (0, 3)),
        ((3, 1, 1), (1, 3)),
        ((0.0, 0.5, 1.0), (0, 2, 3)),
        ((0, 0.99), (0, 3)),
    ],
)
def test_layers_by_index_and_fraction(layers: Any, expected: tuple[int, ...]) -> None:
    assert ComputePath(layers).indices(4) == expected


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((4,), "no layer 4; the model has 4, 0 to 3"),
        ((0, -1), "no layer -1"),
        ((1.5,), "fraction 1.5 is outside"),
        ((float("nan"),), "fraction nan is outside"),
        ((True,), "True is no layer"),
        (("first",), "'first' is no layer"),
        ((), "is empty"),
    ],
)
def test_a_bad_layer_is_named(layers: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ComputePath(layers).indices(4)


@torch.no_grad()
def test_a_path_leaves_layers_out(make_model: Any, tokens: Tensor) -> None:
    model = make_model(num_layers=3).eval()
    expected = model(tokens, path=ComputePath(layers=(0, 2))).logits
    del model.blocks[1]
    torch.testing.assert_close(model(tokens).logits, expected)
