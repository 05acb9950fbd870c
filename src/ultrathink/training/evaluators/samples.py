"""Counts n-grams in texts that a model writes.

Distinct ones: https://arxiv.org/abs/1510.03055, repeated ones: https://arxiv.org/abs/1908.04319.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import torch

from ultrathink.config.evaluators import SamplesEvaluatorConfig
from ultrathink.model.transformer import Transformer
from ultrathink.training.evaluators.base import Evaluator, EvaluatorParts

_DISTINCT, _REPEATED = 2, 4  # n of the n-grams


class SamplesEvaluator(Evaluator):
    """Continues prompts and measures the variety of the texts.

    ``tokens`` is the mean number of tokens written, ``distinct_2`` the share of distinct bigrams in
    all texts, ``repeated_4`` the mean share of a text's 4-grams that occurred in it before.
    """

    def __init__(self, config: SamplesEvaluatorConfig, parts: EvaluatorParts) -> None:
        super().__init__(config)
        self._config = config
        self._tokenizer = parts.tokenizer
        self._continue_prompts = parts.continue_prompts

    def evaluate(self, model: Transformer, step: int) -> Mapping[str, float]:
        seed = int(torch.randint(2**31, ()))
        written = self._continue_prompts(model, self._config, seed)
        return {
            "tokens": sum(one.num_tokens for one in written) / len(written),
            **variety([self._tokenizer.encode(one.text) for one in written]),
        }


def variety(texts: Sequence[Sequence[int]]) -> dict[str, float]:
    """The variety of texts, given as tokens: how little they repeat each other and themselves."""
    pairs = list(chain.from_iterable(_runs(text, _DISTINCT) for text in texts))
    repeated = [1 - _share_of_different(_runs(text, _REPEATED)) for text in texts]
    return {
        f"distinct_{_DISTINCT}": _share_of_different(pairs),
        f"repeated_{_REPEATED}": sum(repeated) / len(texts),
    }


def _runs(text: Sequence[int], length: int) -> list[tuple[int, ...]]:
    return [tuple(text[begin : begin + length]) for begin in range(len(text) - length + 1)]


def _share_of_different(runs: Sequence[tuple[int, ...]]) -> float:
    return len(set(runs)) / len(runs) if runs else 1.0
