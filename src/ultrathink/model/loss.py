"""Cross-entropy of a linear head that never holds the logits of a whole batch.

The gradients with respect to the hidden states and the head are computed chunk by chunk in the
forward pass, while a chunk's logits exist; the backward pass only scales them. After
https://arxiv.org/abs/2411.09009 and https://arxiv.org/abs/2410.10989. The z-loss is that of
https://arxiv.org/abs/2204.02311.

Shapes: N tokens (all of a batch), C hidden size, V vocabulary, n tokens of a chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORED_LABEL = -100
# Logits of a chunk: 16 MiB in bf16 on a CPU, not far above the size of its caches; more on a GPU,
# which needs large products.
CHUNK_LOGITS = 1 << 23
CHUNK_LOGITS_ON_GPU = 1 << 26
MAX_CHUNKS = 16


class HeadLoss(NamedTuple):
    """Sums over the trained tokens of a batch, all of them scalars."""

    cross_entropy: Tensor
    """In nats, at least float32."""

    z_loss: Tensor | None
    """``weight * log_partition²``, at least float32; None when the weight is zero."""

    num_correct: Tensor | None
    """Tokens whose most likely prediction is the label; None unless requested."""

    of_choices: Tensor | None = None
    """``[X]``: the cross-entropy of the tokens of each choice, without gradient; None without."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    loss_weights: Tensor | None = None,
    z_weight: float = 0.0,
    count_correct: bool = False,
    choices: Tensor | None = None,
) -> HeadLoss:
    """Summed cross-entropy of ``hidden @ weight.T`` against ``labels``.

    ``hidden`` is ``[N, C]``, ``weight`` ``[V, C]`` (cast to the dtype of ``hidden``), ``labels``
    ``[N]`` with ``IGNORED_LABEL`` for untrained tokens. ``loss_weights`` ``[N]`` multiply each
    token's cross-entropy, but not its z-loss. ``choices`` ``[N, X]`` are 1 for the tokens of a
    choice, whose unweighted cross-entropy is summed apart, else 0. Softmax runs in at least
    float32. With gradients disabled none are computed.
    """
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if needs_grad:
        cross_entropy, z_loss, num_correct, *more = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden, weight, labels, loss_weights, choices, z_weight, count_correct
        )
        of_choices = more[0] if more else None
    else:
        inputs = (hidden, weight, labels, loss_weights, choices)
        sums = _forward(*inputs, z_weight, count_correct, with_grad=False)
        cross_entropy, z_loss, num_correct, of_choices = sums[:4]
    return HeadLoss(
        cross_entropy,
        z_loss if z_weight > 0 else None,
        num_correct if count_correct else None,
        of_choices,
    )


class _Sums(NamedTuple):
    cross_entropy: Tensor
    z_loss: Tensor
    num_correct: Tensor
    of_choices: Tensor | None
    gradients: list[Tensor]  # (hidden, weight) of the cross-entropy, then of the z-loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        sums = _forward(hidden, weight, *rest, with_grad=True)
        ctx.save_for_backward(*sums.gradients)
        ctx.weight_dtype = weight.dtype
        observed = [sums.num_correct]
        if sums.of_choices is not None:
            observed.append(sums.of_choices)
        ctx.mark_non_differentiable(*observed)
        return sums.cross_entropy, sums.z_loss, *observed

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, *of_z_loss = ctx.saved_tensors
        scale = grad_outputs[0]  # at least float32: its rounding error would scale all gradients
        grad_hidden, grad_weight = hidden.to(scale.dtype) * scale, weight.to(scale.dtype) * scale
        if of_z_loss:
            scale = grad_outputs[1]
            grad_hidden = grad_hidden + of_z_loss[0].to(scale.dtype) * scale
            grad_weight = grad_weight + of_z_loss[1].to(scale.dtype) * scale
        return grad_hidden.to(hidden.dtype), grad_weight.to(ctx.weight_dtype), *[None] * 5


def _forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_weights: Tensor | None,
    choices: Tensor | None,
    z_weight: float,
    count: bool,
    *,
    with_grad: bool,
) -> _Sums:
    """Sums over all chunks and, if requested, their gradients."""
    precise = torch.promote_types(hidden.dtype, torch.float32)
    head = weight.to(hidden.dtype)
    cross_entropy = torch.zeros((), dtype=precise, device=hidden.device)
    z_loss, num_correct = cross_entropy, torch.zeros((), dtype=torch.int64, device=hidden.device)
    of_choices = None if choices is None else choices.new_zeros(choices.shape[1])
    num_losses = (2 if z_weight > 0 else 1) if with_grad else 0
    grad_hidden: list[list[Tensor]] = [[] for _ in range(num_losses)]
    grad_weight: list[Tensor | None] = [None] * num_losses
    size = chunk_tokens(hidden.shape[0], weight.shape[0], hidden.device.type)
    for start in range(0, hidden.shape[0], size):
        rows, targets = hidden[start : start + size], labels[start : start + size]
        trained = (targets != IGNORED_LABEL)[:, None]  # [n, 1]
        targets = torch.where(trained, targets[:, None], 0)  # [n, 1]
        logits = (rows @ head.T).to(precise)  # [n, V]
        log_partition = logits.logsumexp(-1, keepdim=True)  # [n, 1]
        target_logits = logits.gather(-1, targets)
        losses = torch.where(trained, log_partition - target_logits, 0.0)
        own = None if loss_weights is None else loss_weights[start : start + size, None].to(precise)
        cross_entropy = cross_entropy + (losses if own is None else losses * own).sum()
        if choices is not None and of_choices is not None:
            of_choices = of_choices + losses[:, 0].to(choices) @ choices[start : start + size]
        if z_weight > 0:
            squares = torch.where(trained, log_partition.square(), 0.0)
            z_loss = z_loss + z_weight * squares.sum()
        if count:
            hits = (logits.argmax(-1, keepdim=True) == targets) & trained
            num_correct = num_correct + hits.sum()
        if not with_grad:
            continue
        slopes = _logit_gradients(logits, log_partition, targets, trained, z_weight)
        if own is not None:
            slopes[0] = slopes[0] * own
        for index, slope in enumerate(slopes):
            slope = slope.to(hidden.dtype)
            grad_hidden[index].append(slope @ head)
            product = (slope.T @ rows).to(precise)  # chunks are added in full precision
            total = grad_weight[index]
            grad_weight[index] = product if total is None else total + product
    gradients: list[Tensor] = []
    for parts, total in zip(grad_hidden, grad_weight, strict=True):
        gradients.append(torch.cat(parts) if parts else torch.zeros_like(hidden))
        # Kept for the backward pass in the precision of products, like any other product.
        gradients.append(torch.zeros_like(head) if total is None else total.to(head.dtype))
    return _Sums(cross_entropy, z_loss, num_correct, of_choices, gradients)


def _logit_gradients(
    logits: Tensor, log_partition: Tensor, targets: Tensor, trained: Tensor, z_weight: float
) -> list[Tensor]:
    """Gradients ``[n, V]`` of a chunk's cross-entropy and z-loss, zero where nothing is trained."""
    probabilities = (logits - log_partition).exp()
    vocabulary = torch.arange(logits.shape[-1], device=logits.device)
    one_hot = (vocabulary == targets).to(logits.dtype)
    gradients = [torch.where(trained, probabilities - one_hot, 0.0)]
    if z_weight > 0:
        slope = torch.where(trained, 2 * z_weight * log_partition, 0.0)
        gradients.append(probabilities * slope)
    return gradients


def chunk_tokens(num_tokens: int, vocab_size: int, device_type: str) -> int:
    """Tokens of a chunk: for ``CHUNK_LOGITS`` logits, or more if there would be too many chunks."""
    logits = CHUNK_LOGITS if device_type == "cpu" else CHUNK_LOGITS_ON_GPU
    return max(1, logits // vocab_size, -(-num_tokens // MAX_CHUNKS))
