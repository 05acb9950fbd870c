"""Section ``training.objective``: what is learned."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from ultrathink.config.base import PartConfig, PartOf
from ultrathink.config.options import felt, place
from ultrathink.core.registry import Registry

OBJECTIVES: Registry[Any] = Registry("objective")


class ObjectiveConfig(PartConfig):
    """What every objective has."""

    def frozen_models(self) -> dict[str, FrozenSource]:
        """The models that the objective uses and does not train, by name."""
        return {}


class FrozenSource(NamedTuple):
    """Where a frozen model comes from."""

    field: str  # the key that names it
    source: str
    precision: str = "auto"


class PretrainConfig(ObjectiveConfig):
    """The next token of text: cross-entropy, and what the model adds to it."""

    type: Literal["pretrain"] = "pretrain"


class DistillConfig(ObjectiveConfig):
    """Cross-entropy of text, and beside it the divergence from a teacher (arXiv:1503.02531)."""

    type: Literal["distill"] = "distill"
    teacher: str = place()
    """The model to learn from: a run (RUN, RUN@best, RUN@step), a checkpoint folder, or
    hf:PATH_OR_NAME. Its vocabulary is the student's; a student that starts from nothing uses its
    tokenizer."""
    direction: Literal["forward", "reverse"] = felt("forward")
    """forward: KL(teacher, student), which covers what the teacher finds likely; reverse:
    KL(student, teacher), which avoids what it finds unlikely."""
    temperature: float = felt(1.0, gt=0)
    """Divides the logits of both; above 1 small probabilities count more."""
    weight: float = felt(1.0, ge=0)
    """Of the divergence (times temperature²) beside the cross-entropy."""
    precision: Literal["auto", "fp32", "bf16", "fp64"] = felt("auto")
    """Number format of the teacher's weights; auto takes training.precision."""

    def frozen_models(self) -> dict[str, FrozenSource]:
        return {"teacher": FrozenSource("training.objective.teacher", self.teacher, self.precision)}


_PLACE = "ultrathink.training.objectives"
OBJECTIVES.add("pretrain", f"{_PLACE}.pretrain:Pretraining", options=PretrainConfig)
OBJECTIVES.add("distill", f"{_PLACE}.distill:Distillation", options=DistillConfig)
ObjectiveField = Annotated[ObjectiveConfig, PartOf(OBJECTIVES)]
