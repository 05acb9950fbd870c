"""Log-probabilities and divergences of linear heads that never hold the logits of a whole batch.

Logits are ``hidden @ weight.T``, divided by an optional temperature. That is a zero-dimensional
tensor, so that another value does not recompile the step.

Shapes: N tokens (all of a batch), C hidden size, V vocabulary, n tokens of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ultrathink.model.loss import IGNORED_LABEL, chunk_tokens


def linear_log_probabilities(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: Tensor | None = None
) -> Tensor:
    """The log-probability of each label, ``[N]`` in at least float32; 0 for untrained tokens.

    ``hidden`` is ``[N, C]``, ``weight`` ``[V, C]``, ``labels`` ``[N]`` with ``IGNORED_LABEL``. The
    backward pass recomputes each chunk's logits.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        values: Tensor = _LogProbabilities.apply(hidden, weight, labels, temperature)  # type: ignore[no-untyped-call]
        return values
    return _log_probabilities(hidden, weight, labels, temperature)[0]


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    reference_hidden: Tensor,
    reference_weight: Tensor,
    *,
    loss_weights: Tensor | None = None,
    temperature: Tensor | None = None,
    reverse: bool = False,
) -> Tensor:
    """The divergence from a reference, summed over trained tokens, in nats.

    KL(reference ‖ model), or with ``reverse`` KL(model ‖ reference), at ``temperature``. The
    reference ``[N, C']``, ``[V, C']`` is a constant; its width and precision may differ.
    ``labels`` say only which tokens count, ``loss_weights`` ``[N]`` how much. Gradients are
    computed chunk by chunk in the forward pass, as for the cross-entropy
    (https://arxiv.org/abs/2410.10989).
    """
    reference = (reference_hidden, reference_weight)
    inputs = (hidden, weight, labels, *reference, loss_weights, temperature, reverse)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        value: Tensor = _Divergence.apply(*inputs)  # type: ignore[no-untyped-call]
        return value
    return _divergence(*inputs, with_grad=False)[0]


def linear_soft_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    reference_hidden: Tensor,
    reference_weight: Tensor,
    share: Tensor,
    *,
    loss_weights: Tensor | None = None,
) -> Tensor:
    """Summed cross-entropy of ``hidden @ weight.T`` against a mixture of labels and a reference.

    The target of a token is ``1 - share`` of its label and ``share`` (zero-dimensional) of the
    reference's distribution, a constant (https://arxiv.org/abs/1503.02531). Shapes are those of
    ``linear_kl``.
    """
    inputs = (hidden, weight, labels, reference_hidden, reference_weight, share, loss_weights)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        value: Tensor = _SoftCrossEntropy.apply(*inputs)  # type: ignore[no-untyped-call]
        return value
    return _soft_cross_entropy(*inputs, with_grad=False)[0]


class _LogProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, temperature: Tensor | None
    ) -> Tensor:
        values, partitions = _log_probabilities(hidden, weight, labels, temperature)
        ctx.save_for_backward(hidden, weight, labels, temperature, partitions)
        return values

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, temperature, partitions = ctx.saved_tensors
        head = weight.to(hidden.dtype)
        grad_hidden: list[Tensor] = [hidden.new_zeros(0, hidden.shape[1])]
        grad_weight = torch.zeros(weight.shape, dtype=partitions.dtype, device=weight.device)
        for rows in _chunks(hidden, weight):
            states, trained, targets = hidden[rows], *_targets(labels[rows])
            probabilities = (_logits(states, head, temperature) - partitions[rows, None]).exp()
            scale = torch.where(trained, grad_outputs[0][rows, None], 0.0)
            slopes = _divided(
                (_one_hot(targets, probabilities) - probabilities) * scale, temperature
            )
            slopes = slopes.to(hidden.dtype)
            grad_hidden.append(slopes @ head)
            grad_weight += (slopes.T @ states).to(grad_weight.dtype)
        return torch.cat(grad_hidden), grad_weight.to(weight.dtype), None, None


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        total, *gradients = _divergence(hidden, weight, *rest, with_grad=True)
        ctx.save_for_backward(*gradients)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return *_scaled(ctx, grad_outputs[0]), *[None] * 6


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        total, *gradients = _soft_cross_entropy(hidden, weight, *rest, with_grad=True)
        ctx.save_for_backward(*gradients)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return *_scaled(ctx, grad_outputs[0]), *[None] * 5


def _scaled(ctx: Any, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The saved gradients by hidden states and head, times ``scale``, which is at least float32:
    its rounding error would scale all of them."""
    hidden, weight = ctx.saved_tensors
    grad_hidden = (hidden.to(scale.dtype) * scale).to(hidden.dtype)
    return grad_hidden, (weight.to(scale.dtype) * scale).to(ctx.weight_dtype)


def _log_probabilities(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and log-partitions, each ``[N]``."""
    head = weight.to(hidden.dtype)
    nothing = torch.zeros(0, dtype=_precise(hidden), device=hidden.device)
    values, partitions = [nothing], [nothing]
    for rows in _chunks(hidden, weight):
        trained, targets = _targets(labels[rows])
        logits = _logits(hidden[rows], head, temperature)
        partition = logits.logsumexp(-1, keepdim=True)
        found = torch.where(trained, logits.gather(-1, targets) - partition, 0.0)
        values.append(found[:, 0])
        partitions.append(partition[:, 0])
    return torch.cat(values), torch.cat(partitions)


def _divergence(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    reference_hidden: Tensor,
    reference_weight: Tensor,
    loss_weights: Tensor | None,
    temperature: Tensor | None,
    reverse: bool,
    *,
    with_grad: bool,
) -> tuple[Tensor, ...]:
    """The sum over all chunks and, if requested, its gradients by hidden states and head."""
    head, reference_head = weight.to(hidden.dtype), reference_weight.to(reference_hidden.dtype)
    precise = _precise(hidden)
    total = torch.zeros((), dtype=precise, device=hidden.device)
    grad_hidden: list[Tensor] = [hidden.new_zeros(0, hidden.shape[1])]
    grad_weight = torch.zeros(weight.shape if with_grad else 0, dtype=precise, device=weight.device)
    for rows in _chunks(hidden, weight):
        states, (trained, _) = hidden[rows], _targets(labels[rows])
        ours = _logits(states, head, temperature).log_softmax(-1)
        theirs = _logits(reference_hidden[rows], reference_head, temperature)
        theirs = theirs.to(precise).log_softmax(-1)
        if reverse:
            weighed = ours.exp() * (ours - theirs)
        else:
            weighed = theirs.exp() * (theirs - ours)
        each = weighed.sum(-1, keepdim=True)
        counted = torch.where(trained, each, 0.0)
        own = None if loss_weights is None else loss_weights[rows, None].to(precise)
        total = total + (counted if own is None else counted * own).sum()
        if not with_grad:
            continue
        slopes = weighed - ours.exp() * each if reverse else ours.exp() - theirs.exp()
        slopes = _divided(torch.where(trained, slopes, 0.0), temperature)
        slopes = (slopes if own is None else slopes * own).to(hidden.dtype)
        grad_hidden.append(slopes @ head)
        grad_weight = grad_weight + (slopes.T @ states).to(precise)
    if not with_grad:
        return (total,)
    # Kept for the backward pass in the precision of products, like any other product.
    return total, torch.cat(grad_hidden), grad_weight.to(head.dtype)


def _soft_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    reference_hidden: Tensor,
    reference_weight: Tensor,
    share: Tensor,
    loss_weights: Tensor | None,
    *,
    with_grad: bool,
) -> tuple[Tensor, ...]:
    """The sum over all chunks and, if requested, its gradients by hidden states and head."""
    head, reference_head = weight.to(hidden.dtype), reference_weight.to(reference_hidden.dtype)
    precise = _precise(hidden)
    total = torch.zeros((), dtype=precise, device=hidden.device)
    grad_hidden: list[Tensor] = [hidden.new_zeros(0, hidden.shape[1])]
    grad_weight = torch.zeros(weight.shape if with_grad else 0, dtype=precise, device=weight.device)
    for rows in _chunks(hidden, weight):
        states, (trained, labelled) = hidden[rows], _targets(labels[rows])
        ours = _logits(states, head, None).log_softmax(-1)
        theirs = _logits(reference_hidden[rows], reference_head, None).to(precise).softmax(-1)
        targets = theirs * share + _one_hot(labelled, theirs) * (1 - share)
        counted = torch.where(trained, -(targets * ours).sum(-1, keepdim=True), 0.0)
        own = None if loss_weights is None else loss_weights[rows, None].to(precise)
        total = total + (counted if own is None else counted * own).sum()
        if not with_grad:
            continue
        slopes = torch.where(trained, ours.exp() - targets, 0.0)
        slopes = (slopes if own is None else slopes * own).to(hidden.dtype)
        grad_hidden.append(slopes @ head)
        grad_weight = grad_weight + (slopes.T @ states).to(precise)
    if not with_grad:
        return (total,)
    return total, torch.cat(grad_hidden), grad_weight.to(head.dtype)


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    size = chunk_tokens(hidden.shape[0], weight.shape[0], hidden.device.type)
    return [slice(start, start + size) for start in range(0, hidden.shape[0], size)]


def _targets(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens of a chunk are trained, and a label for each, ``[n, 1]``."""
    trained = (labels != IGNORED_LABEL)[:, None]
    return trained, torch.where(trained, labels[:, None], 0)


def _logits(states: Tensor, head: Tensor, temperature: Tensor | None) -> Tensor:
    return _divided((states @ head.T).to(_precise(states)), temperature)


def _divided(values: Tensor, temperature: Tensor | None) -> Tensor:
    return values if temperature is None else values / temperature


def _one_hot(targets: Tensor, like: Tensor) -> Tensor:
    return (torch.arange(like.shape[-1], device=like.device) == targets).to(like.dtype)


def _precise(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
