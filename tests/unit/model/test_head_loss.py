"""The linear cross-entropy: values, gradients, chunks, masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.model.largest_tensor import LargestTensor
from ultrathink.model import loss as loss_module
from ultrathink.model.loss import IGNORED_LABEL, HeadLoss, chunk_tokens, linear_cross_entropy


def make_inputs(
    N: int = 23, C: int = 6, V: int = 11, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(N)
    hidden = torch.randn(N, C, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(V, C, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[::4] = IGNORED_LABEL
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    z_weight: float,
    loss_weights: Tensor | None = None,
) -> HeadLoss:
    logits = hidden.double() @ weight.double().T
    trained = labels != IGNORED_LABEL
    squares = logits.logsumexp(-1).square() * trained
    each = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED_LABEL)
    return HeadLoss(
        (each if loss_weights is None else each * loss_weights).sum(),
        z_weight * squares.sum(),
        ((logits.argmax(-1) == labels) & trained).sum(),
    )


@settings(max_examples=30)
@given(
    N=st.integers(1, 40),
    size=st.integers(1, 48),
    seed=st.integers(0, 9),
    is_weighed=st.booleans(),
)
def test_chunks_change_nothing(N: int, size: int, seed: int, is_weighed: bool) -> None:
    hidden, weight, _ = make_inputs(N)
    labels = torch.randint(-1, 11, (N,), generator=torch.Generator().manual_seed(seed))
    labels[labels < 0] = IGNORED_LABEL
    weights = torch.arange(N) % 3 / 2 if is_weighed else None
    expected = reference(hidden, weight, labels, 0.01, weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "CHUNK_LOGITS", size * weight.shape[0])
        patch.setattr(loss_module, "MAX_CHUNKS", 100)
        ours = linear_cross_entropy(
            hidden, weight, labels, loss_weights=weights, z_weight=0.01, count_correct=True
        )
    for value, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(value, wanted)
    # Scales that differ tell the gradients of the two losses apart.
    inputs = (hidden, weight)
    ours_grads = torch.autograd.grad(3 * ours[0] + 5 * ours[1], inputs)
    expected_grads = torch.autograd.grad(3 * expected[0] + 5 * expected[1], inputs)
    torch.testing.assert_close(ours_grads, expected_grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_softmax_runs_in_float32(dtype: torch.dtype) -> None:
    hidden, weight, labels = make_inputs(200, C=16, V=300, dtype=dtype)
    expected = reference(hidden, weight, labels, 0.0).cross_entropy
    ours = linear_cross_entropy(hidden, weight, labels).cross_entropy
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), expected, rtol=2e-3, atol=0)
    for value, wanted in zip(
        torch.autograd.grad(ours / 150, (hidden, weight)),
        torch.autograd.grad(expected / 150, (hidden, weight)),
        strict=True,
    ):
        assert value.dtype == dtype
        torch.testing.assert_close(value.double(), wanted.double(), rtol=0.02, atol=2e-4)


def test_the_gradients_of_all_chunks_are_added_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 2)
    monkeypatch.setattr(loss_module, "MAX_CHUNKS", 4096)
    # 2,000 equal rows: a sum in bfloat16 would stop growing at 256 times one row's gradient.
    hidden = torch.ones(2000, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, requires_grad=True)
    linear_cross_entropy(
        hidden, weight, torch.zeros(2000, dtype=torch.int64)
    ).cross_entropy.backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    torch.testing.assert_close(weight.grad, torch.tensor([[-1000.0], [1000.0]]))


def test_no_gradient_is_computed_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = make_inputs()
    expected = linear_cross_entropy(hidden, weight, labels).cross_entropy

    def refuse(*args: Any) -> Any:
        raise AssertionError("a gradient was computed")

    monkeypatch.setattr(loss_module, "_logit_gradients", refuse)
    with torch.no_grad():
        out = linear_cross_entropy(hidden, weight, labels).cross_entropy
    assert not out.requires_grad
    torch.testing.assert_close(out, expected.detach())
    with pytest.raises(AssertionError, match="a gradient was computed"):
        linear_cross_entropy(hidden, weight, labels)


def test_the_logits_of_a_whole_batch_are_never_held() -> None:
    N, C, V = 4096, 2, 8192
    hidden, weight, labels = make_inputs(N, C, V, dtype=torch.float32)
    with LargestTensor() as largest:
        linear_cross_entropy(hidden, weight, labels, z_weight=0.1).cross_entropy.backward()
    assert largest.numel == chunk_tokens(N, V, "cpu") * V
    assert largest.numel <= N * V / 4
    for device in ("cpu", "cuda"):  # chunks are few, however long the batch
        assert chunk_tokens(10**6, 2**13, device) * loss_module.MAX_CHUNKS >= 10**6
        assert chunk_tokens(10, 2**30, device) == 1


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("backend", ["sdpa", "blocks"])
def test_a_model_with_nothing_to_train_has_zero_gradients(
    make_model: Any, tokens: Tensor, tied: bool, backend: str
) -> None:
    model = make_model(tie_embeddings=tied, z_loss=0.1, backend=backend)
    out = model(tokens, torch.full_like(tokens, IGNORED_LABEL))
    assert out.num_tokens.item() == 0
    (out.loss + out.aux_losses["z_loss"]).backward()
    assert out.loss.item() == 0
    for parameter in model.parameters():
        assert torch.all(parameter.grad == 0)
