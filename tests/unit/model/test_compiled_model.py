"""The compiled model has no graph breaks and the gradients of the eager one."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

# torch.compile uses deprecated parts of torch itself; every other warning is an error here.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.compiled
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_gradients_equal_eager_gradients(
    make_model: Any, tokens: Tensor, packed: Any
) -> None:
    model = make_model(num_layers=1, z_loss=0.01, backend="blocks")
    documents, positions, _ = packed
    inputs = (tokens, tokens.roll(-1, 1))
    options = {"document_ids": documents.contiguous(), "positions": positions.contiguous()}
    eager = model(*inputs, **options)
    (eager.loss + 2 * eager.aux_losses["z_loss"]).backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    out = torch.compile(model, fullgraph=True)(*inputs, **options)
    (out.loss + 2 * out.aux_losses["z_loss"]).backward()
    torch.testing.assert_close(out.loss, eager.loss)
    assert out.num_tokens.item() == 80
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "mode"),
    [("blocks", "full"), ("sdpa", "selective")],
)
def test_training_is_one_graph(
    make_model: Any, tokens: Tensor, packed: Any, backend: str, mode: str
) -> None:
    model = make_model(backend=backend, num_layers=1, qk_norm=True, tie_embeddings=False)
    model.compute_dtype = torch.bfloat16
    model.set_activation_checkpointing(mode)
    documents, positions, _ = packed
    inputs = (tokens, tokens.roll(-1, 1))
    options = {"document_ids": documents.contiguous(), "positions": positions.contiguous()}
    model(*inputs, **options).loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs, **options).loss.backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0.02, atol=0.02)


@torch.no_grad()
def test_evaluation_is_one_graph(
    make_model: Any, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ultrathink.model.rope.INITIAL_POSITIONS", 8)  # fewer than tokens
    model = make_model().eval()
    assert model.rope.cos.shape[0] == 8
    labels = tokens.roll(-1, 1)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, :9] = False
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(tokens, labels, attention_mask=mask)
    assert model.rope.cos.shape[0] == 8
    eager = model(tokens, labels, attention_mask=mask)
    torch.testing.assert_close(out.loss, eager.loss)
    assert out.stats["num_correct"].item() == eager.stats["num_correct"].item()
