"""No position sees a later token, nor another document."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.model.conftest import assert_causal

BACKENDS = ["sdpa", "blocks", "eager"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_packed", [False, True])
def test_a_token_changes_no_logit_before_it(
    make_model: Any, tokens: Tensor, packed: Any, backend: str, is_packed: bool
) -> None:
    model = make_model(backend=backend, dtype=torch.float64).eval()
    assert_causal(model, tokens, packed, is_packed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_documents_equal_documents_on_their_own(
    make_model: Any, tokens: Tensor, packed: Any, backend: str
) -> None:
    model = make_model(backend=backend, dtype=torch.float64)
    documents, positions, spans = packed
    labels = tokens.roll(-1, 1)
    together = model(tokens, labels, document_ids=documents, positions=positions)
    together.loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    apart = sum(model(tokens[:, a:b], labels[:, a:b]).loss for a, b in spans)
    apart.backward()
    torch.testing.assert_close(together.loss, apart, rtol=1e-10, atol=0)
    for expected, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-8, atol=1e-10)


@torch.no_grad()
def test_documents_and_a_padding_mask_combine(make_model: Any, tokens: Tensor, packed: Any) -> None:
    documents, positions, spans = packed
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 12:15] = False  # inside the second document
    start, stop = spans[1]
    for backend in BACKENDS:
        model = make_model(backend=backend, dtype=torch.float64).eval()
        packed_logits = model(
            tokens, document_ids=documents, positions=positions, attention_mask=mask
        ).logits
        alone = model(tokens[:, start:stop], attention_mask=mask[:, start:stop]).logits
        torch.testing.assert_close(packed_logits[:, start:stop], alone)


def test_a_mask_that_does_not_fit_is_refused(make_model: Any, tokens: Tensor) -> None:
    model = make_model()
    with pytest.raises(ValueError, match=r"\[2, 39\].*use \[2, 40\]"):
        model(tokens, attention_mask=torch.ones(2, 39, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"torch.int64; use bool"):
        model(tokens, attention_mask=torch.ones(2, 40, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"broadcasts to \[2, 4, 40, 40\]"):
        model(tokens, attention_mask=torch.ones(2, 3, 40, 40, dtype=torch.bool))
