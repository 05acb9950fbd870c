"""Scores on another held-out text, such as one of several domains."""

from __future__ import annotations

from collections.abc import Mapping

from ultrathink.config.evaluators import TextEvaluatorConfig
from ultrathink.model.transformer import Transformer
from ultrathink.training.evaluators.base import Evaluator, EvaluatorParts
from ultrathink.training.scoring import in_batches_that_fit
from ultrathink.training.validation import evaluate


class TextEvaluator(Evaluator):
    """The figures of a validation on another text: ``loss``, ``ppl``, ``bits_per_byte``,
    ``token_accuracy``."""

    def __init__(self, config: TextEvaluatorConfig, parts: EvaluatorParts) -> None:
        super().__init__(config)
        self._text = parts.open_text(config.source)
        self._max_tokens = config.max_tokens
        self._batch_size = parts.batch_size
        self._group = parts.group

    def evaluate(self, model: Transformer, step: int) -> Mapping[str, float]:
        scores, fit = in_batches_that_fit(
            lambda size: evaluate(
                model,
                self._text,
                device=model.device,
                batch_size=size,
                max_tokens=self._max_tokens,
                dp_group=self._group,
            ),
            self._batch_size,
            can_shrink=self._group.size == 1,
            what="it",
            advice="Use a lower training.eval.batch_size.",
        )
        self._batch_size = fit.size
        return {"loss": scores.loss, **scores.figures}
