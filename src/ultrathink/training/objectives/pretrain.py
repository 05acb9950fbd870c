"""Pretraining: cross-entropy of the next token."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple

from torch import Tensor

from ultrathink.config.objective import ObjectiveConfig
from ultrathink.data.batch import Batch
from ultrathink.model.transformer import Transformer
from ultrathink.training.group_targets import GroupTargets
from ultrathink.training.objectives.base import (
    LOSS,
    TOKENS,
    WEIGHTS,
    Losses,
    Objective,
    Parts,
    Term,
)
from ultrathink.training.validation import Scores, evaluate


class Sums(NamedTuple):
    """A model's results for a micro-batch, summed over its trained tokens."""

    loss: Tensor  # cross-entropy, nats
    aux_losses: dict[str, Tensor]
    stats: dict[str, Tensor]  # without gradients


def loss_function(model: Transformer) -> Callable[..., Sums]:
    """The part of a step that is compiled: from token ids to losses."""

    def summed_losses(
        input_ids: Tensor,
        labels: Tensor,
        positions: Tensor | None,
        document_ids: Tensor | None,
        loss_weights: Tensor | None = None,
        group_targets: Tensor | None = None,
    ) -> Sums:
        output = model(
            input_ids,
            labels=labels,
            positions=positions,
            document_ids=document_ids,
            loss_weights=loss_weights,
            group_targets=group_targets,
        )
        assert output.loss is not None
        return Sums(output.loss, output.aux_losses, output.stats)

    return summed_losses


class Pretraining(Objective):
    """Cross-entropy of the next token, and the auxiliary losses of the model.

    If the batch has weights, the cross-entropy is their weighted mean.
    """

    best_by: ClassVar = {LOSS: -1, "token_accuracy": 1}

    def __init__(self, config: ObjectiveConfig, parts: Parts) -> None:
        super().__init__(parts)
        moe = self.model.config.moe
        self.group_targets = GroupTargets(parts.source_groups, moe, parts.device)
        self.sums = parts.compilation.of_pass(loss_function(self.model))

    def counts(self, batch: Batch) -> dict[str, float]:
        counts: dict[str, float] = {TOKENS: batch.num_target_tokens}
        if batch.loss_weights is not None:
            counts[WEIGHTS] = batch.target_weight
        return counts

    def losses(self, batch: Batch) -> Losses:
        weights = self.loss_weights(batch)
        sums = self.sums(*self.inputs(batch), *weights, **self.group_targets.options(batch))
        loss = Term(sums.loss, per=WEIGHTS if weights else TOKENS)
        terms = {name: Term(value) for name, value in sums.aux_losses.items()}
        return Losses({LOSS: loss, **terms}, sums.stats)

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Ids, labels and, if documents are isolated, positions and documents, on the device."""
        input_ids, labels = batch.on(self.device, "input_ids", "targets")
        if not self.isolate_documents:
            return input_ids, labels, None, None
        positions, document_ids = batch.on(self.device, "positions", "document_ids")
        return input_ids, labels, positions, document_ids

    def loss_weights(self, batch: Batch) -> list[Tensor]:
        """The weights of the batch, if any, on the device."""
        return [] if batch.loss_weights is None else batch.on(self.device, "loss_weights")

    def score(self, batch_size: int, max_batches: int | None = None) -> Scores:
        assert self.held_out is not None, "there is held-out text"
        return evaluate(
            self.model,
            self.held_out,
            device=self.device,
            batch_size=batch_size,
            max_tokens=self.scored_tokens,
            max_batches=max_batches,
            dp_group=self.dp_group,
            paths=self.scored_paths,
        )
