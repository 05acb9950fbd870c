"""The interface of an objective, for the trainer, the step and validation."""

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

LOSS = "loss"  # the term that is reported as the loss
TOKENS = "tokens"  # the count of trained positions, which every batch has
WEIGHTS = "loss_weights"  # the sum of their weights, if the batch has any


class Term(NamedTuple):
    """A term of the minimized loss: ``weight * sum / count of the batch``."""

    sum: Tensor
    """Over a micro-batch, at least float32, with its gradient."""

    weight: Tensor | None = None
    """Zero-dimensional, and read in each pass, so that it may change during a run; None is 1."""

    per: str = TOKENS
    """The count of the whole batch that divides the sum."""


class Losses(NamedTuple):
    """The results of the passes over a micro-batch."""

    terms: dict[str, Term]
    """By the reported name; ``LOSS`` is one of them."""

    stats: dict[str, Tensor]
    """Observations without gradients, summed over trained tokens."""


@dataclass(frozen=True)
class Parts:
    """What an objective is built from, ready for this machine."""

    models: ModelSet
    device: torch.device
    isolate_documents: bool = True
    compilation: Compilation = EAGER
    seed: int = 0  # of the run
    dp_group: Group = ALONE  # processes that hold different parts of a batch
    held_out: ValidationSet | None = None
    scored_tokens: int | None = None  # of the held-out text; None: all
    scored_paths: tuple[str, ...] = ()  # compute paths that are validated beside the whole model
    source_groups: tuple[tuple[str, ...], ...] = ()  # expert groups of each training source


class Objective(ABC):
    """A training objective: its batch, passes, loss terms and validation.

    ``losses`` and ``counts`` are pure functions of the batch and the weights, because a micro-batch
    that does not fit into memory is repeated in smaller ones. What may happen only once per step
    belongs in ``prepare``.
    """

    best_by: ClassVar[Mapping[str, int]] = {LOSS: -1}
    """Validation figures that may choose the best checkpoint: 1 if higher is better, else -1."""

    without_detectors: ClassVar[frozenset[str]] = frozenset()
    """Classes of detectors that do not work for this loss, such as a negative one."""

    is_guarded: ClassVar[bool] = True
    """Whether a guard may judge an update by the step's loss."""

    kind: ClassVar[Kind] = "model"
    """The kind of its checkpoints."""

    def __init__(self, parts: Parts) -> None:
        self.models = parts.models
        self.model = parts.models.main
        self.device = parts.device
        self.isolate_documents = parts.isolate_documents
        self.dp_group = parts.dp_group
        self.held_out = parts.held_out
        self.scored_tokens = parts.scored_tokens
        self.scored_paths = parts.scored_paths

    @classmethod
    def modules(cls, config: Any, model: Transformer) -> dict[str, TrainedModule]:
        """The modules trained in addition to ``model``, by name, with their initial weights.

        ``config`` is ``training.objective``. ``model`` has its initial weights, unsharded on the
        CPU; later ``self.models.modules`` has all modules. To compute sizes only, everything is on
        the device ``meta``.
        """
        return {}

    def before_step(self, step: int) -> None:
        """Prepare the main model for the passes of ``step``."""
        if self.model.routing is not None:
            self.model.routing.warm_up(step)

    def prepare(self, batch: Batch, step: int) -> Batch:
        """Complete the batch of ``step``, once, before its passes and any repetition of them."""
        return batch

    @abstractmethod
    def counts(self, batch: Batch) -> dict[str, float]:
        """The counts that divide the sums, for this process's share; they add up over processes."""

    @abstractmethod
    def losses(self, batch: Batch) -> Losses:
        """Pass over a micro-batch, which is on the CPU."""

    def before_update(self) -> None:  # noqa: B027 - few objectives need it
        """Correct the gradients of a step, after all of its passes."""

    def after_update(self, stats: Mapping[str, Tensor], summed: Callable[[Tensor], Tensor]) -> None:
        """Adjust the main model after an update of its weights.

        ``stats`` are those of this process's share of the batch; ``summed`` sums a tensor over all
        processes.
        """
        load = stats.get("expert_load")
        if load is not None:
            self.model.move_selection_biases(summed(load))
        logits = stats.get("depth_logits")
        if logits is not None:
            self.model.move_depth_thresholds(summed(logits))

    @property
    def header(self) -> Header:
        """The header of its checkpoints; that of an adapter has the hash of its model."""
        return Header(self.kind)

    @property
    def can_score(self) -> bool:
        """Whether there is text to validate on."""
        return self.held_out is not None

    @property
    def num_scored(self) -> int:
        """Tokens of a full validation."""
        return 0 if self.held_out is None else self.held_out.extent(self.scored_tokens).num_tokens

    @abstractmethod
    def score(self, batch_size: int, max_batches: int | None = None) -> Scores:
        """Validate on the held-out text, or its first ``max_batches`` batches."""
