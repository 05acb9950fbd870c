"""Distillation: cross-entropy of the next token, plus the divergence from a teacher.

https://arxiv.org/abs/1503.02531; the reverse direction is https://arxiv.org/abs/2306.08543.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ultrathink.config.objective import DistillConfig
from ultrathink.data.batch import Batch
from ultrathink.model.token_losses import linear_kl
from ultrathink.model.transformer import Transformer
from ultrathink.training.objectives.base import LOSS, TOKENS, WEIGHTS, Losses, Parts, Term
from ultrathink.training.objectives.pretrain import Pretraining, Sums

KL = "kl"


class Distillation(Pretraining):
    """Cross-entropy plus the divergence from a teacher over the same tokens.

    The divergence is reported as ``kl``, in nats per token at the temperature. It is minimized as
    ``weight * temperature² * kl``, so that gradients keep their size at any temperature. Validation
    is that of pretraining.
    """

    def __init__(self, config: DistillConfig, parts: Parts) -> None:
        super().__init__(config, parts)
        self.teacher = parts.models.frozen["teacher"]
        # Tensors, so that other values do not recompile the step.
        self.temperature = torch.tensor(config.temperature, device=parts.device)
        self.weight = torch.tensor(config.weight, device=parts.device)
        divergence = parts.compilation.of_head(
            partial(linear_kl, reverse=config.direction == "reverse")
        )
        self.sums_beside = parts.compilation.of_pass(loss_function(self.model, divergence))

    def losses(self, batch: Batch) -> Losses:
        input_ids, labels, *isolated = self.inputs(batch)
        weights = self.loss_weights(batch)
        with self.teacher.states(input_ids, *isolated) as (states, weight):
            asked = (states, weight, self.temperature, *weights)
            targets = self.group_targets.options(batch)
            sums = self.sums_beside(input_ids, labels, *isolated, *asked, **targets)
        terms = {name: Term(value) for name, value in sums.aux_losses.items()}
        per = WEIGHTS if weights else TOKENS
        terms[KL] = Term(terms[KL].sum, self.weight * self.temperature.square(), per)
        return Losses({LOSS: Term(sums.loss, per=per), **terms}, sums.stats)


def loss_function(model: Transformer, divergence: Callable[..., Tensor]) -> Callable[..., Sums]:
    """The function from token ids, teacher states ``[B, T, C]`` and head ``[V, C]`` to losses."""

    def summed_losses(
        input_ids: Tensor,
        labels: Tensor,
        positions: Tensor | None,
        document_ids: Tensor | None,
        states: Tensor,
        weight: Tensor,
        temperature: Tensor,
        loss_weights: Tensor | None = None,
        group_targets: Tensor | None = None,
    ) -> Sums:
        def head(x: Tensor, own_weight: Tensor, *_: object) -> dict[str, Tensor]:
            targets = labels.flatten()
            weights = None if loss_weights is None else loss_weights.flatten()
            own = model.head_loss(x, targets, weights)
            assert own.loss is not None
            kl = divergence(
                x.flatten(0, 1),
                own_weight,
                targets,
                states.flatten(0, 1),
                weight,
                loss_weights=weights,
                temperature=temperature,
            )
            return {LOSS: own.loss, KL: kl, **own.aux_losses}

        output = model(
            input_ids,
            labels=labels,
            positions=positions,
            document_ids=document_ids,
            head=head,
            group_targets=group_targets,
        )
        losses = dict(output.head)
        return Sums(losses.pop(LOSS), {**losses, **output.aux_losses}, output.stats)

    return summed_losses
