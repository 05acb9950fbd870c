"""Scores on another held-out text, such as one of several domains."""

from __future__ import annotations

from collections.abc import Mapping

from ultrathink.config.evaluators import TextEvaluatorConfig
from ultrathink.core.errors import OutOfMemoryError
from ultrathink.model.transformer import Transformer
from ultrathink.training.evaluators.base import Evaluator, EvaluatorParts
from ultrathink.training.out_of_memory import smaller_until_it_fits
from ultrathink.training.validation import Scores, evaluate


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
        def attempt(size: int) -> Scores:
            return evaluate(
                model,
                self._text,
                device=model.device,
                batch_size=size,
                max_tokens=self._max_tokens,
                dp_group=self._group,
            )

        scores, fit = smaller_until_it_fits(attempt, self._batch_size, self._smaller)
        self._batch_size = fit.size
        return {"loss": scores.loss, **scores.figures}

    def _smaller(self, size: int, problem: str) -> int:
        if size > 1 and self._group.size == 1:
            return size // 2
        raise OutOfMemoryError(
            f"it ran out of memory with batches of {size} ({problem}); take a lower "
            f"training.eval.batch_size"
        )
