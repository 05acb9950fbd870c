"""Rotary tables keep their precision at any position, on any path to a device or dtype."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ultrathink.config.model import ModelConfig
from ultrathink.model.rope import (
    INITIAL_POSITIONS,
    RotaryEmbedding,
    apply_rotary,
    inverse_frequencies,
)

CONFIG = ModelConfig(hidden_size=64, num_heads=4, vocab_size=5).resolved()
SCALED = ModelConfig.model_validate(
    {
        "hidden_size": 64,
        "num_heads": 4,
        "vocab_size": 5,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_positions": 32},
    }
).resolved()


def exact(config: ModelConfig, position: int) -> tuple[list[float], list[float]]:
    inverse = inverse_frequencies(16, config.rope_theta, config.rope_scaling).tolist()
    factor = 1.0 if config.rope_scaling is None else 0.1 * math.log(4.0) + 1.0
    angles = [position * frequency for frequency in inverse]
    return [factor * math.cos(a) for a in angles], [factor * math.sin(a) for a in angles]


def assert_exact(rope: RotaryEmbedding, config: ModelConfig, tolerance: float = 1e-6) -> None:
    for position in (0, 1, 4095, 4096, 32_767, 131_071):
        cos, sin = rope(torch.tensor([position]), 1)[:, 0, 0, 0]
        expected_cos, expected_sin = exact(config, position)
        assert cos.tolist() == pytest.approx(expected_cos, abs=tolerance)
        assert sin.tolist() == pytest.approx(expected_sin, abs=tolerance)


@pytest.mark.parametrize("config", [CONFIG, SCALED])
def test_far_positions_agree_with_float64(config: ModelConfig) -> None:
    assert_exact(RotaryEmbedding(config), config)


def test_tables_keep_their_precision_whatever_a_model_is_converted_to() -> None:
    for change in ("half", "bfloat16", "float"):
        rope = getattr(RotaryEmbedding(CONFIG), change)()
        assert rope.cos.dtype == rope.sin.dtype == torch.float32
        assert_exact(rope, CONFIG)
    rope = RotaryEmbedding(CONFIG).half().double()
    assert rope.cos.dtype == torch.float64
    assert_exact(rope, CONFIG, tolerance=1e-12)
    assert rope.float().cos.dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    assert RotaryEmbedding(CONFIG).cos.dtype == torch.float64


def test_tables_are_right_after_meta_construction() -> None:
    with torch.device("meta"):
        rope = RotaryEmbedding(CONFIG)
    assert rope.cos.is_meta
    rope.to_empty(device="cpu")
    assert_exact(rope, CONFIG)
    rope.cos.fill_(7.0)
    rope.reset_tables()
    assert_exact(rope, CONFIG)


def test_tables_grow_on_demand() -> None:
    rope = RotaryEmbedding(CONFIG)
    assert rope(None, 10).shape == (2, 1, 1, 10, 8)
    assert rope.cos.shape[0] == INITIAL_POSITIONS
    rope(None, 1, offset=INITIAL_POSITIONS)
    assert rope.cos.shape[0] == 2 * INITIAL_POSITIONS
    rope.reserve(5 * INITIAL_POSITIONS)
    assert rope.cos.shape[0] == 8 * INITIAL_POSITIONS


def test_traced_code_computes_tables_that_are_too_short(monkeypatch: pytest.MonkeyPatch) -> None:
    rope = RotaryEmbedding(CONFIG)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    length = INITIAL_POSITIONS + 3
    traced = rope(None, length)
    assert rope.cos.shape[0] == INITIAL_POSITIONS
    monkeypatch.undo()
    torch.testing.assert_close(traced, rope(None, length), rtol=0, atol=0)


def test_default_positions_count_from_the_offset() -> None:
    rope = RotaryEmbedding(CONFIG)
    torch.testing.assert_close(rope(None, 5, offset=3), rope(torch.arange(3, 8), 5))
    rows = torch.stack((torch.arange(5), torch.arange(5) + 9))
    by_row = rope(rows, 5)
    assert by_row.shape == (2, 2, 1, 5, 8)
    torch.testing.assert_close(by_row[:, 1:], rope(None, 5, offset=9))
    with pytest.raises(ValueError, match="-1 was given"):
        rope(torch.tensor([0, -1]), 2)


def test_halves_are_rotated_in_float32() -> None:
    rope, half = RotaryEmbedding(CONFIG), torch.randn(2, 3, 7, 16).bfloat16()
    expected = apply_rotary(half.float(), rope(None, 7)).bfloat16()
    torch.testing.assert_close(apply_rotary(half, rope(None, 7)), expected, rtol=0, atol=0)


@torch.no_grad()
def test_logits_depend_on_distances_only(make_model: Any, tokens: Tensor) -> None:
    model = make_model(dtype=torch.float64)
    near = model(tokens).logits
    far = model(tokens, positions=torch.arange(40) + 131_031).logits
    torch.testing.assert_close(far, near, rtol=0, atol=1e-9)
    stretched = model(tokens, positions=torch.arange(40) * 3).logits
    assert (stretched - near).abs().max() > 1e-3
