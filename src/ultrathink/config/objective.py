"""Section ``training.objective``: what is learned."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from ultrathink.config.base import PartConfig, PartOf, Section
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


class ExitLossConfig(Section):
    """A loss at the exits of the model, one of them in each step, on the pass of the whole model
    (arXiv:2404.16710)."""

    weight: float = felt(0.2, ge=0)
    """Of the loss beside that of the whole model; an exit's weight falls in proportion to its
    depth."""
    share: float = felt(0.5, gt=0, le=1)
    """Share of the tokens of each sequence that an exit is trained on."""
    ramp_steps: int = felt(100, ge=0)
    """Steps over which the weight rises from 0."""


class SubPathConfig(Section):
    """Further passes over some sequences, on paths that do not begin the whole model."""

    names: tuple[str, ...] | None = felt(None)
    """The paths, by name; all named ones that neither begin the whole model nor are it, when
    unset."""
    weight: float = felt(0.3, ge=0)
    """Of the loss beside that of the whole model."""
    rows: float = felt(0.25, gt=0, le=1)
    """Share of the sequences that one of the paths runs again in each step."""
    ramp_steps: int = felt(100, ge=0)
    """Steps over which the weight rises from 0."""
    layer_dropout: float = felt(0.0, ge=0, lt=1)
    """Probability that a sequence skips the last layer in such a pass; it falls to 0 at the first
    layer (arXiv:2404.16710)."""
    sample_top_k: bool = felt(False)
    """Send the tokens of a sequence to fewer experts in some layers of such a pass, at random
    (arXiv:2509.26520)."""


class ElasticConfig(ObjectiveConfig):
    """The next token of text, learned by every compute path of the model."""

    type: Literal["elastic"] = "elastic"
    exits: ExitLossConfig | None = ExitLossConfig()
    """A loss at the exits; none when null."""
    sub_paths: SubPathConfig | None = SubPathConfig()
    """Passes on other paths; none when null."""
    distill: float = felt(0.5, ge=0, le=1)
    """Share of the target that is the whole model's distribution, for exits and sub-paths; the rest
    is the label."""


_PLACE = "ultrathink.training.objectives"
OBJECTIVES.add("pretrain", f"{_PLACE}.pretrain:Pretraining", options=PretrainConfig)
OBJECTIVES.add("distill", f"{_PLACE}.distill:Distillation", options=DistillConfig)
OBJECTIVES.add("elastic", f"{_PLACE}.elastic:Elastic", options=ElasticConfig)
ObjectiveField = Annotated[ObjectiveConfig, PartOf(OBJECTIVES)]
