"""Chunked log-probabilities and divergences against full logits in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.model.largest_tensor import LargestTensor
from ultrathink.model import loss as loss_module
from ultrathink.model.loss import IGNORED_LABEL, chunk_tokens, linear_cross_entropy
from ultrathink.model.token_losses import linear_kl, linear_log_probabilities

V = 11


class Case:
    """A model's states and head, a reference of another width, labels."""

    def __init__(self, N: int = 23, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.hidden, self.weight = draw(N, 6).requires_grad_(), draw(V, 6).requires_grad_()
        self.reference = (draw(N, 4), draw(V, 4))
        self.labels = torch.randint(-1, V, (N,), generator=generator)
        self.labels[self.labels < 0] = IGNORED_LABEL
        self.trained = self.labels != IGNORED_LABEL
        self.loss_weights: Tensor | None = None  # of divergences

    def ours(self, kind: str, temperature: Tensor | None) -> Tensor:
        """A scalar whose gradient tells tokens apart."""
        if kind == "log":
            values = linear_log_probabilities(self.hidden, self.weight, self.labels, temperature)
            return (values * torch.arange(len(values))).sum()
        return linear_kl(
            self.hidden,
            self.weight,
            self.labels,
            *self.reference,
            loss_weights=self.loss_weights,
            temperature=temperature,
            reverse=kind == "reverse",
        )

    def expected(self, kind: str, temperature: float) -> Tensor:
        """The same from whole logits in float64."""
        ours = (self.hidden.double() @ self.weight.double().T / temperature).log_softmax(-1)
        states, head = self.reference
        theirs = (states.double() @ head.double().T / temperature).log_softmax(-1)
        if kind == "log":
            chosen = ours.gather(-1, self.labels.clamp(min=0)[:, None])[:, 0]
            return (chosen * self.trained * torch.arange(len(chosen))).sum()
        p, q = (ours, theirs) if kind == "reverse" else (theirs, ours)
        each = (p.exp() * (p - q)).sum(-1) * self.trained
        return (each if self.loss_weights is None else each * self.loss_weights).sum()

    def gradients(self, scalar: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(scalar, (self.hidden, self.weight), retain_graph=True)


KINDS = pytest.mark.parametrize("kind", ["log", "forward", "reverse"])


@KINDS
@settings(max_examples=20, deadline=None)
@given(
    N=st.integers(1, 40),
    size=st.integers(1, 48),
    temperature=st.sampled_from([None, 0.5, 1.0, 2.5]),
    seed=st.integers(0, 9),
    is_weighed=st.booleans(),
)
def test_values_and_gradients_are_those_of_whole_logits(
    kind: str, N: int, size: int, temperature: float | None, seed: int, is_weighed: bool
) -> None:
    case = Case(N, seed=seed)
    case.loss_weights = torch.arange(N) % 3 / 2 if is_weighed else None
    given_ = None if temperature is None else torch.tensor(temperature, dtype=torch.float64)
    expected = case.expected(kind, temperature or 1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "CHUNK_LOGITS", size * V)
        patch.setattr(loss_module, "MAX_CHUNKS", 100)
        ours = case.ours(kind, given_)
        # The factor stands for what later steps of the backward pass do.
        for value, wanted in zip(
            case.gradients(3 * ours), case.gradients(3 * expected), strict=True
        ):
            torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-11)
        with torch.no_grad():
            torch.testing.assert_close(case.ours(kind, given_), ours, rtol=0, atol=0)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


@KINDS
def test_softmax_runs_in_float32(kind: str) -> None:
    case = Case(200, torch.bfloat16)
    ours, expected = case.ours(kind, torch.tensor(2.0)), case.expected(kind, 2.0)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), expected, rtol=1e-2, atol=0)
    for value, wanted in zip(case.gradients(ours), case.gradients(expected), strict=True):
        assert value.dtype == torch.bfloat16
        error = (value.double() - wanted.double()).norm() / wanted.double().norm()
        assert error < 0.02


def test_log_probabilities_are_the_cross_entropy_of_each_token() -> None:
    case = Case()
    values = linear_log_probabilities(case.hidden, case.weight, case.labels)
    loss = linear_cross_entropy(case.hidden, case.weight, case.labels).cross_entropy
    torch.testing.assert_close(-values.sum(), loss)
    for ours, wanted in zip(case.gradients(-values.sum()), case.gradients(loss), strict=True):
        torch.testing.assert_close(ours, wanted)


@KINDS
@pytest.mark.parametrize("with_grad", [False, True])
def test_no_tensor_is_as_large_as_the_logits_of_the_batch(kind: str, with_grad: bool) -> None:
    N, vocab = 16384, 2048
    chunk = chunk_tokens(N, vocab, "cpu") * vocab
    hidden = torch.randn(N, 8, requires_grad=with_grad)
    weight = torch.randn(vocab, 8, requires_grad=with_grad)
    labels, reference = torch.zeros(N, dtype=torch.int64), (torch.randn(N, 8), weight.detach())

    with LargestTensor() as largest:
        if kind == "log":
            value = linear_log_probabilities(hidden, weight, labels).sum()
        else:
            value = linear_kl(hidden, weight, labels, *reference, reverse=kind == "reverse")
        if with_grad:
            value.backward()
    assert largest.numel == chunk
    assert chunk <= N * vocab / 4
