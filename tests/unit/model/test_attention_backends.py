"""The kernels agree, in results and gradients, with every kind of mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ultrathink.core.errors import ConfigError
from ultrathink.model.attention_backends import (
    block_causal_attention,
    choose_backend,
    eager_attention,
    sdpa_attention,
)
from ultrathink.model.attention_mask import AttentionMask, build_mask

OTHERS = [sdpa_attention, block_causal_attention]


def make_heads(T: int, H: int = 4, K: int = 2, D: int = 8, B: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(T)
    shapes = [(B, H, T, D), (B, K, T, D), (B, K, T, D)]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in shapes
    ]


def with_gradients(backend: Any, heads: list[Tensor], mask: AttentionMask | None) -> list[Tensor]:
    out = backend(*heads, mask)
    slopes = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad((out * slopes).sum(), heads)]


def mask_for(
    heads: list[Tensor],
    *,
    dense: bool,
    attention_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> AttentionMask | None:
    B, H, T, _ = heads[0].shape
    return build_mask(
        batch_size=B,
        num_heads=H,
        num_queries=T,
        num_keys=heads[1].shape[2],
        dtype=heads[0].dtype,
        device=heads[0].device,
        attention_mask=attention_mask,
        document_ids=document_ids,
        dense_documents=dense,
    )


@settings(max_examples=25)
@given(
    T=st.integers(1, 90),
    H_K=st.sampled_from([(4, 4), (4, 2), (4, 1), (3, 1)]),
    cuts=st.lists(st.integers(0, 90), max_size=4),
)
def test_backends_agree_on_any_length_and_packing(
    T: int, H_K: tuple[int, int], cuts: list[int]
) -> None:
    heads = make_heads(T, *H_K)
    documents = None
    if cuts:
        at = torch.arange(T)
        documents = sum((at >= cut).long() for cut in cuts).expand(2, T)  # type: ignore[union-attr]
    expected = with_gradients(
        eager_attention, heads, mask_for(heads, dense=True, document_ids=documents)
    )
    for backend in OTHERS:
        dense = backend is not block_causal_attention
        mask = mask_for(heads, dense=dense, document_ids=documents)
        for ours, theirs in zip(with_gradients(backend, heads, mask), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", [*OTHERS, eager_attention])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float64(backend: Any, dtype: torch.dtype) -> None:
    heads = make_heads(33)
    expected = with_gradients(eager_attention, heads, None)
    low = [head.detach().to(dtype).requires_grad_() for head in heads]
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for ours, theirs in zip(with_gradients(backend, low, None), expected, strict=True):
        assert ours.dtype == dtype
        scale = float(theirs.abs().max())
        assert float((ours.double() - theirs).abs().max()) < tolerance * scale


@pytest.mark.parametrize("backend", [*OTHERS, eager_attention])
@pytest.mark.parametrize("sizes", [(2, 21), (2, 1, 21, 21), (1, 4, 21, 21)])
def test_boolean_and_additive_masks_agree(backend: Any, sizes: tuple[int, ...]) -> None:
    heads = make_heads(21)
    allowed = torch.rand(sizes, generator=torch.Generator().manual_seed(2)) > 0.5
    allowed[..., 0] = True
    expected = with_gradients(
        eager_attention, heads, mask_for(heads, dense=True, attention_mask=allowed)
    )
    for blocked in (float("-inf"), torch.finfo(torch.float32).min):
        bias = torch.zeros(sizes).masked_fill(~allowed, blocked)
        for mask in (allowed, bias, bias.double()):
            combined = mask_for(heads, dense=False, attention_mask=mask)
            for value, wanted in zip(
                with_gradients(backend, heads, combined), expected, strict=True
            ):
                torch.testing.assert_close(value, wanted)


@pytest.mark.parametrize("backend", [*OTHERS, eager_attention])
def test_an_additive_mask_is_added(backend: Any) -> None:
    query, key, value = make_heads(9, H=2, K=2)
    bias = torch.randn(1, 2, 9, 9, dtype=torch.float64)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5 + bias
    scores = scores.masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), float("-inf"))
    mask = mask_for([query, key, value], dense=False, attention_mask=bias)
    torch.testing.assert_close(backend(query, key, value, mask), scores.softmax(-1) @ value)


@pytest.mark.parametrize("backend", [*OTHERS, eager_attention])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["boolean", "minus infinity", "smallest number"])
def test_fully_masked_rows_are_zero_with_finite_gradients(
    backend: Any, dtype: torch.dtype, kind: str
) -> None:
    heads = [head.detach().to(dtype).requires_grad_() for head in make_heads(12)]
    allowed = torch.ones(2, 12, dtype=torch.bool)
    allowed[0, :5] = False  # the first five queries of the first sequence see nothing
    allowed[1, :] = False  # no query of the second sees anything
    mask = allowed
    if kind != "boolean":
        blocked = float("-inf") if kind == "minus infinity" else torch.finfo(dtype).min
        mask = torch.zeros(2, 12, dtype=dtype).masked_fill(~allowed, blocked)
    combined = mask_for(heads, dense=False, attention_mask=mask)
    out, *gradients = with_gradients(backend, heads, combined)
    assert torch.all(out[0, :, :5] == 0)
    assert torch.all(out[1] == 0)
    assert torch.all(out[0, :, 5:].abs().sum(-1) > 0)
    for gradient in gradients:
        assert torch.isfinite(gradient).all()
        assert torch.all(gradient[1] == 0)
    assert torch.all(gradients[0][0, :, :5] == 0)
    assert torch.all(gradients[2][0, :, :5] == 0)  # values nobody saw


@pytest.mark.parametrize(
    ("device", "dtype", "seq_len", "compiled", "expected"),
    [
        ("cpu", torch.bfloat16, 256, True, "blocks"),
        ("cpu", torch.float32, 512, True, "blocks"),
        ("cpu", torch.float32, 256, False, "sdpa"),
        ("cpu", torch.bfloat16, 512, False, "blocks"),
        ("cpu", torch.float64, 256, True, "sdpa"),
        ("cpu", torch.bfloat16, 4096, True, "sdpa"),
        ("cuda", torch.bfloat16, 256, True, "sdpa"),
    ],
)
def test_a_backend_is_chosen_for_the_machine(
    device: str, dtype: torch.dtype, seq_len: int, compiled: bool, expected: str
) -> None:
    assert choose_backend(device, dtype, seq_len, compiled=compiled) == expected


def test_a_backend_is_set_by_name(make_model: Any) -> None:
    model = make_model(backend="auto")
    assert model.attention_backend == "sdpa"
    model.set_attention_backend("blocks")
    assert model.attention_backend == "blocks"
    with pytest.raises(ConfigError, match="Did you mean 'blocks'"):
        model.set_attention_backend("block")
