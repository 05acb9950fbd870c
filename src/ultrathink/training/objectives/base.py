"""What a run learns, as the trainer, the step and validation see it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ultrathink.checkpoint.format import Header, Kind
from ultrathink.data.batch import Batch
from ultrathink.data.validation import ValidationSet
from ultrathink.model.transformer import Transformer
from ultrathink.parallel.world import ALONE, Group
from ultrathink.training.compiling import EAGER, Compilation
from ultrathink.training.model_set import ModelSet, TrainedModule
from ultrathink.training.validation import Scores

LOSS = "loss"  # the term that reports call the loss
TOKENS = "tokens"  # the count that every batch has: positions that are trained
WEIGHTS = "loss_weights"  # the sum of their weights, where a batch has any


class Term(NamedTuple):
    """A summand of what is minimized: ``weight * sum / count of the batch``."""

    sum: Tensor
    """Over a micro-batch, at least float32, with its gradient."""

    weight: Tensor | None = None
    """Zero-dimensional and read in each pass, so that it may change meanwhile; None is 1."""

    per: str = TOKENS
    """By which count of the whole batch the sum is divided."""


class Losses(NamedTuple):
    """What the passes over a micro-batch gave."""

    terms: dict[str, Term]
    """By the name that reports show; ``LOSS`` is among them."""

    stats: dict[str, Tensor]
    """Observations without gradients, summed over trained tokens."""


@dataclass(frozen=True)
class Parts:
    """What an objective is made from, ready for this machine."""

    models: ModelSet
    device: torch.device
    isolate_documents: bool = True
    compilation: Compilation = EAGER
    dp_group: Group = ALONE  # processes that hold different parts of a batch
    held_out: ValidationSet | None = None
    scored_tokens: int | None = None  # of the held-out text; all where None


class Objective(ABC):
    """One way of learning: its batch, its passes, its loss terms, its validation.

    ``losses`` and ``counts`` are pure functions of the batch and the weights: a micro-batch that
    memory does not suffice for is repeated in smaller pieces. What may happen only once a step
    belongs into ``prepare``.
    """

    best_by: ClassVar[Mapping[str, int]] = {LOSS: -1}
    """Figures of a validation by which a best one may be chosen: 1 where more is better, or -1."""

    without_detectors: ClassVar[frozenset[str]] = frozenset()
    """Detectors, by class, that are not made for this kind of loss: a negative one, say."""

    is_guarded: ClassVar[bool] = True
    """Whether a guard may judge an update by the step's loss."""

    kind: ClassVar[Kind] = "model"
    """What its checkpoints are."""

    def __init__(self, parts: Parts) -> None:
        self.models = parts.models
        self.model = parts.models.main
        self.device = parts.device
        self.dp_group = parts.dp_group
        self.held_out = parts.held_out
        self.scored_tokens = parts.scored_tokens

    @classmethod
    def modules(cls, config: Any, model: Transformer) -> dict[str, TrainedModule]:
        """What is trained beside ``model``, by name: its weights, drawn from the run's seed.

        ``config`` is ``training.objective``. ``model`` has its first weights, on the CPU and whole;
        ``self.models.modules`` has all of them once they are ready. Where only sizes are asked for
        all is on the device ``meta``.
        """
        return {}

    def before_step(self, step: int) -> None:
        """Set what the main model needs before the passes of ``step``."""
        if self.model.routing is not None:
            self.model.routing.warm_up(step)

    def prepare(self, batch: Batch, step: int) -> Batch:
        """Complete the batch of ``step``, once, before its passes and their repetitions."""
        return batch

    @abstractmethod
    def counts(self, batch: Batch) -> dict[str, float]:
        """What sums are divided by, of this process's share; over all processes they add up."""

    @abstractmethod
    def losses(self, batch: Batch) -> Losses:
        """Pass over a micro-batch, which lies on the CPU."""

    def after_update(self, stats: Mapping[str, Tensor], summed: Callable[[Tensor], Tensor]) -> None:
        """Set what the main model needs after an update of its weights.

        ``stats`` are those of this process's share of the batch; ``summed`` adds a tensor up over
        all processes.
        """
        load = stats.get("expert_load")
        if load is not None:
            self.model.move_selection_biases(summed(load))

    @property
    def header(self) -> Header:
        """What its checkpoints say they are; one that adds to a model names that one's hash."""
        return Header(self.kind)

    @property
    def can_score(self) -> bool:
        """Whether there is text to validate on."""
        return self.held_out is not None

    @property
    def num_scored(self) -> int:
        """Tokens of a whole validation."""
        return 0 if self.held_out is None else self.held_out.extent(self.scored_tokens).num_tokens

    @abstractmethod
    def score(self, batch_size: int, max_batches: int | None = None) -> Scores:
        """Validate on the held-out text, or on its first batches, ``batch_size`` at a time."""
