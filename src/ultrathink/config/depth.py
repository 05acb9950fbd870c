"""Section ``model.mod``: layers that only some tokens of a sequence go through.

Mixture-of-Depths, https://arxiv.org/abs/2404.02258.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator, model_validator

from ultrathink.config.base import Section, no_truth_values
from ultrathink.config.experts import shape
from ultrathink.config.options import felt
from ultrathink.core.layers import layer_index

EIGHTHS = 8
_DEFAULT = 0.5


def eighths_of(capacity: float) -> int:
    """The eighths nearest to a capacity between 0 and 1, from 1 to 8."""
    return max(1, int(capacity * EIGHTHS + 0.5))


class PredictorConfig(Section):
    """What decides in evaluation, where a token's rank among later ones is not known."""

    hidden_size: int | None = shape(None, gt=0)
    """Width of its hidden layer; a sixteenth of model.hidden_size, at least 8, when unset."""
    weight: float = felt(0.1, gt=0)
    """Weight of its cross-entropy. Nothing else has a gradient from it."""
    threshold_rate: float = felt(0.5, gt=0, le=1)
    """How far a step moves each threshold, in standard deviations of the logits, for a share of
    positives that is off by 1."""


class ModConfig(Section):
    """Depth routing: a share of the tokens goes through a layer, the others pass it by."""

    layers: Literal["all", "interleaved"] | tuple[int | float, ...] = shape("interleaved")
    """Layers that tokens may pass by: all, every second one, or a list of indices and fractions of
    the depth."""
    scope: Literal["feed_forward", "block"] = shape("feed_forward")
    """What a token passes by: the feed-forward layer (or the experts), or attention as well. Of a
    block it then has no key and no value, either."""
    capacity: float = felt(_DEFAULT, gt=0, le=1)
    """Share of a sequence's tokens that go through, rounded to eighths; it can be changed during
    training. The last one of the schedule, if there is one, when unset."""
    strategy: Literal["learned", "fixed", "random"] = shape("learned")
    """How tokens are chosen: by a router, at fixed positions, or at random (to compare with)."""
    predictor: PredictorConfig = PredictorConfig()
    """What decides in evaluation, under a learned strategy."""
    schedule: tuple[float, ...] = felt(())
    """Capacities during training, each for an equal share of its steps, ending with capacity; none
    when empty."""

    _layers = field_validator("layers", mode="before")(no_truth_values)

    @model_validator(mode="before")
    @classmethod
    def _a_schedule_gives_the_capacity(cls, values: Any) -> Any:
        schedule = values.get("schedule") if isinstance(values, dict) else None
        if schedule and isinstance(schedule, list | tuple) and "capacity" not in values:
            return {**values, "capacity": schedule[-1]}
        return values

    @model_validator(mode="after")
    def _the_schedule_fits(self) -> ModConfig:
        for capacity in self.schedule:
            if not 0 < capacity <= 1:
                raise ValueError(
                    f"schedule has the capacity {capacity}; use shares above 0, up to 1"
                )
        if self.schedule and eighths_of(self.schedule[-1]) != self.eighths:
            raise ValueError(
                f"schedule ends with {self.schedule[-1]}, and capacity is {self.capacity}; the "
                f"model keeps the last one: make them equal, or leave capacity out"
            )
        return self

    @property
    def eighths(self) -> int:
        """The capacity in eighths."""
        return eighths_of(self.capacity)

    def eighths_at(self, step: int, total_steps: int) -> int:
        """The capacity of ``step`` (from 1) by the schedule, in eighths."""
        if not self.schedule:
            return self.eighths
        stage = (step - 1) * len(self.schedule) // max(1, total_steps)
        return eighths_of(self.schedule[min(stage, len(self.schedule) - 1)])

    def rounded(self) -> list[str]:
        """A sentence for each capacity that is no eighth."""
        found = {"model.mod.capacity": self.capacity}
        found |= {f"model.mod.schedule.{at}": one for at, one in enumerate(self.schedule)}
        return [
            f"{key} = {value:g} is rounded to {eighths_of(value) / EIGHTHS:g}: shapes are compiled "
            f"for eighths of a sequence."
            for key, value in found.items()
            if value != eighths_of(value) / EIGHTHS
        ]

    def layer_indices(self, num_layers: int) -> tuple[int, ...]:
        """The layers that tokens may pass by, ascending; ConfigError for one that is not there."""
        if self.layers == "all":
            return tuple(range(num_layers))
        if self.layers == "interleaved":
            return tuple(range(1, num_layers, 2))
        where = "model.mod.layers"
        return tuple(sorted({layer_index(layer, num_layers, where) for layer in self.layers}))
