"""One optimizer step: micro-batches forward and backward, clipping, the update.

On several processes each has its share of the batch. What decides (the counts that losses are
divided by, the loss, the norm) is summed over all of them, so all come to the same decision.
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
    smaller_start,
    smaller_until_it_fits,
    told_as,
)
from ultrathink.training.settings import LiveSettings

_CLIP_EPS = 1e-6  # what torch adds to the norm that it divides by


class Means(NamedTuple):
    """What the passes over a batch gave, of this process's share."""

    terms: dict[str, Tensor]  # each term's sum over the count of the whole batch, unweighted
    stats: dict[str, Tensor]  # sums


@dataclass(frozen=True)
class StepResult:
    """What one step found."""

    loss: float  # the objective's term of that name; of text the mean over trained tokens, nats
    aux_losses: dict[str, float]  # its other terms
    grad_norm: float
    num_tokens: int
    skipped: bool
    stats: dict[str, Tensor]  # summed over this process's share of the batch, on the device
    norms: dict[str, float] = field(default_factory=dict)  # by layer, where they were asked for


class Verdict(NamedTuple):
    """What a guard says of an update: the largest norm it may have, or that it is left out."""

    clip: float | None = None  # None: as configured; else the stricter of the two holds
    skip: bool = False


class UpdateGuard(Protocol):
    """Is asked before each update that is finite; where it has a state, checkpoints hold it.

    All processes ask it about the same numbers, and so come to the same verdict.
    """

    def judge(self, step_loss: float, grad_norm: float) -> Verdict:
        """Say what to do with the update of a step: its loss in nats, its norm before clipping."""
        ...


class Step(Protocol):
    """How a batch becomes an update: one pass after the other here, a pipeline could be another."""

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
    """Takes optimizer steps; a step that is not finite, or has nothing to learn, is left out.

    A left-out step touches neither weights nor optimizer state, so step counts and bias
    correction go on as if its batch had never been. ``guard`` may leave out more. ``on_smaller`` is
    told which micro-batch memory did not suffice for, and what is taken instead.
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
        """Learn from one batch, of which this process has its share.

        ``lr_factor`` is the share of the peak rate; ``with_norms`` measures each layer.
        """
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_factor
        counts = self._counts(batch)
        means = self._while_memory_suffices(
            lambda size: self._accumulate(batch, size, counts), batch, settings
        )
        with told_as(UPDATE_FAILED):
            result = self._learn(means, counts, settings, with_norms)
        for parameter in self.parameters:
            parameter.grad = None
        return result

    def allocate_state(self) -> None:
        """Take the memory that the optimizers need; OutOfMemoryError where there is not enough."""
        with told_as(STATE_DOES_NOT_FIT):
            allocate_state(self.optimizers)

    def _learn(
        self,
        means: Means,
        counts: Mapping[str, float],
        settings: LiveSettings,
        with_norms: bool,
    ) -> StepResult:
        """Update the weights by the gradients of a batch, unless it is to be left out."""
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
            # Where nothing is clipped the factor would be 1: a pass over all gradients for nothing.
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
        """The rate of the last step in the first group, which is the one that configs call ``lr``.

        It is read from the optimizer: what was used, whatever was asked for.
        """
        rate: float = self.optimizers[0].param_groups[0]["lr"]
        return rate

    def _counts(self, batch: Batch) -> dict[str, float]:
        """What the objective's sums are divided by, of the whole batch."""
        mine = self.objective.counts(batch)
        with self.clock.running():
            return dict(zip(mine, self.dp_group.sums(list(mine.values())), strict=True))

    def _accumulate(self, batch: Batch, size: int, counts: Mapping[str, float]) -> Means:
        """Add up the gradients of micro-batches of ``size`` sequences.

        Each term is divided by the count of the whole batch: micro-batches are not averaged, but
        weighted by what is in them.
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
        """``attempt`` with micro-batches as set, and repeated with smaller ones where memory fails.

        One of several processes cannot: the others wait in the middle of theirs.
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
