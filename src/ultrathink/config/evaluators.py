"""Section ``training.evaluators``: what else is measured during training."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from ultrathink.config.base import PartConfig, PartOf, Section
from ultrathink.config.data import SourceField
from ultrathink.config.options import free
from ultrathink.core.registry import Registry

EVALUATORS: Registry[Any] = Registry("evaluator")


class EvaluatorConfig(PartConfig):
    """What every evaluator has."""

    name: str | None = free(None, pattern=r"^[^/\s]+$")
    """What metrics call the evaluator; its type when unset."""
    every_steps: int | None = free(None, gt=0)
    """Evaluate after every so many steps; the model at the end always is."""

    @property
    def label(self) -> str:
        """The name, given or not."""
        return self.name or self.type


class SampleConfig(Section):
    """How prompts are continued."""

    prompts: tuple[str, ...] | None = free(None)
    """Texts to continue, none when empty; the first words of two held-out documents when unset."""
    max_new_tokens: int = free(160, gt=0)
    """Tokens to write for each prompt."""
    temperature: float = free(0.7, ge=0)
    """Sampling temperature; 0 is greedy."""
    top_p: float = free(0.95, gt=0, le=1)
    """Share of probability sampled from."""


class TextEvaluatorConfig(EvaluatorConfig):
    """Loss, perplexity, bits per byte and accuracy on another held-out text."""

    type: Literal["text"] = "text"
    source: SourceField = free()
    """The text, all of which is held out; a source as in data.train."""
    max_tokens: int | None = free(None, gt=0)
    """Use only so many tokens, spread evenly; all of them when unset."""


class SamplesEvaluatorConfig(SampleConfig, EvaluatorConfig):
    """Length, variety and repetition of what the model writes."""

    type: Literal["samples"] = "samples"
    prompts: tuple[str, ...] = free(min_length=1)
    """Texts to continue."""


_PLACE = "ultrathink.training.evaluators"
EVALUATORS.add("text", f"{_PLACE}.text:TextEvaluator", options=TextEvaluatorConfig)
EVALUATORS.add("samples", f"{_PLACE}.samples:SamplesEvaluator", options=SamplesEvaluatorConfig)
EvaluatorField = Annotated[EvaluatorConfig, PartOf(EVALUATORS)]
