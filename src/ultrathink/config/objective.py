"""Section ``training.objective``: what is learned."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from ultrathink.config.base import PartConfig, PartOf
from ultrathink.core.registry import Registry

OBJECTIVES: Registry[Any] = Registry("objective")


class ObjectiveConfig(PartConfig):
    """What every objective has."""

    def frozen_models(self) -> dict[str, FrozenSource]:
        """The models that the objective asks and does not train, by name."""
        return {}


class FrozenSource(NamedTuple):
    """Where a frozen model comes from."""

    field: str  # the key that names it
    source: str
    precision: str = "auto"


class PretrainConfig(ObjectiveConfig):
    """The next token of text: cross-entropy, and what the model adds to it."""

    type: Literal["pretrain"] = "pretrain"


_PLACE = "ultrathink.training.objectives"
OBJECTIVES.add("pretrain", f"{_PLACE}.pretrain:Pretraining", options=PretrainConfig)
ObjectiveField = Annotated[ObjectiveConfig, PartOf(OBJECTIVES)]
