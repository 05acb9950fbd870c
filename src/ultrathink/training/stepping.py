"""One optimizer step: micro-batches forward and backward, clipping, the update.

Each of several processes has its share of the batch. The counts that divide the losses, the loss
and the norm are summed over all of them, so all make the same decision.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ultrathink.core.random import set_torch_random_state, torch_random_state
from ultrathink.data.batch import Batch
from ultrathink.parallel.timing import CommunicationClock
from ultrathink.parallel.world import ALONE, Group, World
from ultrathink.training.norms import LayerNorms, total_norm
from ultrathink.training.objectives.base import LOSS, TOKENS, Objective
from ultrathink.training.offload import HostCopies
from ultrathink.training.optimizers import NO_COPIES, Optimizers, allocate_state
from ultrathink.training.out_of_memory import (
    STATE_DOES_NOT_FIT,
    UPDATE_FAILED,
    Fit,
    half_of,
    nothing_smaller,
    out_of_memory_as,
    smaller_start,
    smaller_until_it_fits,
)
from ultrathink.training.settings import LiveSettings

_CLIP_EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_


class Means(NamedTuple):
    """The results of the passes over this process's share of a batch."""

    terms: dict[str, Tensor]  # each term's sum / count of the whole batch, unweighted
    stats: dict[str, Tensor]  # sums


@dataclass(frozen=True)
class StepResult:
    """The results of one step."""

    loss: float  # the objective's term LOSS; for text the mean over trained tokens, nats
    aux_losses: dict[str, float]  # its other terms
    grad_norm: float
    num_tokens: int
    skipped: bool
    stats: dict[str, Tensor]  # summed over this process's share of the batch, on the device
    norms: dict[str, float] = field(default_factory=dict)  # by layer, if requested


class Verdict(NamedTuple):
    """A guard's verdict on an update: the largest norm it may have, or that it is skipped."""

    clip: float | None = None  # None: as configured; else the stricter of the two applies
    skip: bool = False


class UpdateGuard(Protocol):
    """Judges each finite update before it is applied; a state, if it has one, is in checkpoints.

    Every process has its own guard, which sees the same numbers and so gives the same verdict.
    """

    def judge(self, step_loss: float, grad_norm: float) -> Verdict:
        """The verdict on an update, from the step's loss (nats) and its norm before clipping."""
        ...


class Step(Protocol):
    """Turns a batch into an update; ``Stepper`` does it in sequence, a pipeline may differ."""

    objective: Objective
    optimizers: Optimizers
    host: HostCopies | None
    host_names: Mapping[Tensor, str]
    guard: UpdateGuard | None
    clock: CommunicationClock
    on_smaller: Callable[[int, Fit], None]

    def take_step(
        self, batch: Batch, settings: LiveSettings, lr_factor: float, *, with_norms: bool = False
    ) -> StepResult: ...

    def allocate_state(self) -> None: ...

    def learning_rate(self) -> float: ...


class Stepper:
    """Takes optimizer steps; skips an update that is not finite or has nothing to learn.

    A skipped update changes neither weights nor optimizer state, so step counts and bias
    correction continue as if the batch did not exist. ``guard`` may skip more.
    ``on_smaller(size, fit)`` is called when micro-batches of ``size`` did not fit into memory.
    """

    def __init__(
        self,
        objective: Objective,
        optimizers: Optimizers,
        *,
        world: World = ALONE,
        dp_group: Group = ALONE,
        host: HostCopies | None = None,
        guard: UpdateGuard | None = None,
    ) -> None:
        self.objective = objective
        self.optimizers = optimizers
        self.world = world
        self.accumulations = objective.models.accumulations
        self.dp_group = dp_group
        self.host = host
        self.guard: UpdateGuard | None = guard
        self.host_names: Mapping[Tensor, str] = host.names if host is not None else NO_COPIES
        self.clock = self.accumulations[0].clock if self.accumulations else CommunicationClock()
        self.on_smaller: Callable[[int, Fit], None] = lambda size, fit: None
        named = objective.models.named_parameters()
        self.parameters = [parameter for parameter in named.values() if parameter.requires_grad]
        self.layer_norms = LayerNorms(objective.model)

    def take_step(
        self, batch: Batch, settings: LiveSettings, lr_factor: float, *, with_norms: bool = False
    ) -> StepResult:
        """Learn from this process's share of one batch.

        ``lr_factor`` is the factor of the peak rate; ``with_norms`` measures each layer.
        """
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_factor
        counts = self._counts(batch)
        means = self._while_memory_suffices(
            lambda size: self._accumulate(batch, size, counts), batch, settings
        )
        self.objective.before_update()
        with out_of_memory_as(UPDATE_FAILED):
            result = self._learn(means, counts, settings, with_norms)
        for parameter in self.parameters:
            parameter.grad = None
        return result

    def allocate_state(self) -> None:
        """Allocate the optimizers' states; OutOfMemoryError if memory is too small."""
        with out_of_memory_as(STATE_DOES_NOT_FIT):
            allocate_state(self.optimizers)

    def _learn(
        self,
        means: Means,
        counts: Mapping[str, float],
        settings: LiveSettings,
        with_norms: bool,
    ) -> StepResult:
        """Update the weights with the gradients of a batch, unless the update is skipped."""
        norm = total_norm([p.grad for p in self.parameters if p.grad is not None])
        shares = [value.item() for value in means.terms.values()]
        with self.clock.running():
            sums = self.dp_group.sums(shares)
        aux_losses = dict(zip(means.terms, sums, strict=True))
        loss_value, norm_value = aux_losses.pop(LOSS), norm.item()
        is_sound = any(counts.values()) and math.isfinite(loss_value) and math.isfinite(norm_value)
        norms: dict[str, float] = {}
        verdict = Verdict(skip=not is_sound)
        if is_sound and self.guard is not None:
            verdict = self.guard.judge(loss_value, norm_value)
        if not verdict.skip:
            norms = self.layer_norms.before_update() if with_norms else {}
            limits = [limit for limit in (settings.clip, verdict.clip) if limit is not None]
            # Only if it clips: a factor of 1 would cost a pass over all gradients.
            if limits and norm_value + _CLIP_EPS > min(limits):
                torch.nn.utils.clip_grads_with_norm_(self.parameters, min(limits), norm)
            self._update(settings)
            self.objective.after_update(means.stats, self._summed)
            norms |= self.layer_norms.after_update()
        return StepResult(
            loss=loss_value,
            aux_losses=aux_losses,
            grad_norm=norm_value,
            num_tokens=int(counts[TOKENS]),
            skipped=verdict.skip,
            stats=means.stats,
            norms=norms,
        )

    def learning_rate(self) -> float:
        """The rate of the last step in the first group, which configs call ``lr``.

        It is read from the optimizer, so it is the rate that was used.
        """
        rate: float = self.optimizers[0].param_groups[0]["lr"]
        return rate

    def _counts(self, batch: Batch) -> dict[str, float]:
        """The counts of the whole batch that divide the objective's sums."""
        mine = self.objective.counts(batch)
        with self.clock.running():
            return dict(zip(mine, self.dp_group.sums(list(mine.values())), strict=True))

    def _accumulate(self, batch: Batch, size: int, counts: Mapping[str, float]) -> Means:
        """Add up the gradients of micro-batches of ``size`` sequences.

        Each term is divided by the count of the whole batch, so that micro-batches are weighted by
        their tokens instead of averaged.
        """
        terms: dict[str, Tensor] = {}
        stats: dict[str, Tensor] = {}
        micro_batches = batch.split(size)
        for number, micro_batch in enumerate(micro_batches, start=1):
            for accumulation in self.accumulations:
                accumulation.before_micro_batch(number == len(micro_batches))
            losses = self.objective.losses(micro_batch)
            means = {
                name: term.sum / (counts[term.per] or 1.0) for name, term in losses.terms.items()
            }
            weighted = [
                mean if term.weight is None else mean * term.weight
                for mean, term in zip(means.values(), losses.terms.values(), strict=True)
            ]
            functools.reduce(torch.add, weighted).backward()
            _add_to(terms, {name: mean.detach() for name, mean in means.items()})
            _add_to(stats, losses.stats)
        return Means(terms, stats)

    def _while_memory_suffices(
        self, attempt: Callable[[int], Means], batch: Batch, settings: LiveSettings
    ) -> Means:
        """``attempt`` with the current micro-batch size, repeated with smaller ones if necessary.

        With several processes it raises instead: the others wait in their own passes.
        """
        before, random_state = settings.micro_batch_size, torch_random_state()

        def undo() -> None:
            for parameter in self.parameters:
                parameter.grad = None
            set_torch_random_state(random_state)

        def smaller(size: int, problem: str) -> int:
            if size <= batch.unit_size:
                checkpointing = self.objective.model.activation_checkpointing
                raise nothing_smaller(batch.seq_len, problem, checkpointing)
            half = half_of(batch.num_sequences, size)
            if self.world.size > 1:
                self.on_smaller(size, Fit(half, problem))
                raise smaller_start(self.world.rank, size, half, problem)
            return half

        means, fit = smaller_until_it_fits(attempt, before, smaller, undo)
        if fit.size != before:
            settings.micro_batch_size = fit.size
            self.on_smaller(before, fit)
        return means

    def _summed(self, values: Tensor) -> Tensor:
        with self.clock.running():
            return self.dp_group.summed(values)

    def _update(self, settings: LiveSettings) -> None:
        if self.host is not None:
            self.host.take_gradients()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                decay = settings.weight_decay
                if group["decayed"]:
                    group["weight_decay"] = group["own_decay"] if decay is None else decay
            optimizer.step()
        if self.host is not None:
            self.host.give_weights()


def _add_to(totals: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    for name, value in more.items():
        totals[name] = totals[name] + value if name in totals else value
