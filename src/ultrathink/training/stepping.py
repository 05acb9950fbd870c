"""One optimizer step: micro-batches forward and backward, clipping, the update.

On several processes each has its share of the batch. What decides (the count of trained tokens, the
loss, the norm) is summed over all of them, so all come to the same decision.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ultrathink.core.random import set_torch_random_state, torch_random_state
from ultrathink.data.batch import Batch
from ultrathink.model.transformer import Transformer
from ultrathink.parallel.sharding import Accumulation
from ultrathink.parallel.timing import CommunicationClock
from ultrathink.parallel.world import ALONE, World
from ultrathink.training.norms import LayerNorms, total_norm
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


class Sums(NamedTuple):
    """What a model tells of a micro-batch, each summed over its trained tokens."""

    loss: Tensor  # cross-entropy, nats
    aux_losses: dict[str, Tensor]
    stats: dict[str, Tensor]  # without gradients


# input_ids, labels, positions, document_ids
LossFunction = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Sums]


def loss_function(model: nn.Module) -> LossFunction:
    """The part of a step that is worth compiling: from token ids to losses."""

    def summed_losses(
        input_ids: Tensor, labels: Tensor, positions: Tensor | None, document_ids: Tensor | None
    ) -> Sums:
        output = model(input_ids, labels=labels, positions=positions, document_ids=document_ids)
        return Sums(output.loss, output.aux_losses, output.stats)

    return summed_losses


@dataclass(frozen=True)
class StepResult:
    """What one step found."""

    loss: float  # mean over trained tokens, nats
    aux_losses: dict[str, float]
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


class Stepper:
    """Takes optimizer steps; a step that is not finite, or has nothing to learn, is left out.

    A left-out step touches neither weights nor optimizer state, so step counts and bias
    correction go on as if its batch had never been. ``guard`` may leave out more. ``on_smaller`` is
    told which micro-batch memory did not suffice for, and what is taken instead.
    """

    def __init__(
        self,
        model: Transformer,
        optimizers: Optimizers,
        losses: LossFunction,
        *,
        device: torch.device,
        isolate_documents: bool,
        world: World = ALONE,
        accumulation: Accumulation | None = None,
        host: HostCopies | None = None,
        guard: UpdateGuard | None = None,
    ) -> None:
        self.model = model
        self.optimizers = optimizers
        self.losses = losses
        self.device = device
        self.isolate_documents = isolate_documents
        self.world = world
        self.accumulation = accumulation
        self.host = host
        self.guard = guard
        self.host_names = host.names if host is not None else NO_COPIES
        self.clock = accumulation.clock if accumulation is not None else CommunicationClock()
        self.on_smaller: Callable[[int, Fit], None] = lambda size, fit: None
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.layer_norms = LayerNorms(model)

    def take_step(
        self, batch: Batch, settings: LiveSettings, lr_factor: float, *, with_norms: bool = False
    ) -> StepResult:
        """Learn from one batch, of which this process has its share.

        ``lr_factor`` is the share of the peak rate; ``with_norms`` measures each layer.
        """
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_factor
        with self.clock.running():
            num_tokens = int(self.world.sums([batch.num_target_tokens])[0])
        sums = self._passes(batch, settings, max(1, num_tokens))
        with told_as(UPDATE_FAILED):
            result = self._learn(sums, num_tokens, settings, with_norms)
        for parameter in self.parameters:
            parameter.grad = None
        return result

    def allocate_state(self) -> None:
        """Take the memory that the optimizers need; OutOfMemoryError where there is not enough."""
        with told_as(STATE_DOES_NOT_FIT):
            allocate_state(self.optimizers)

    def _learn(
        self,
        sums: Sums,
        num_tokens: int,
        settings: LiveSettings,
        with_norms: bool,
    ) -> StepResult:
        """Update the weights by the gradients of a batch, unless it is to be left out."""
        loss, aux_losses, stats = sums
        norm = total_norm([p.grad for p in self.parameters if p.grad is not None])
        shares = [value.item() for value in (loss, *aux_losses.values())]
        with self.clock.running():
            loss_value, *aux_values = self.world.sums(shares)
        norm_value = norm.item()
        is_sound = num_tokens > 0 and math.isfinite(loss_value) and math.isfinite(norm_value)
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
            self._even_out_experts(stats)
            norms |= self.layer_norms.after_update()
        return StepResult(
            loss=loss_value,
            aux_losses=dict(zip(aux_losses, aux_values, strict=True)),
            grad_norm=norm_value,
            num_tokens=num_tokens,
            skipped=verdict.skip,
            stats=stats,
            norms=norms,
        )

    def learning_rate(self) -> float:
        """The rate of the last step in the first group, which is the one that configs call ``lr``.

        It is read from the optimizer: what was used, whatever was asked for.
        """
        rate: float = self.optimizers[0].param_groups[0]["lr"]
        return rate

    def _passes(self, batch: Batch, settings: LiveSettings, num_tokens: int) -> Sums:
        """``_backward``, begun anew in smaller micro-batches where memory does not suffice.

        One of several processes cannot: the others wait in the middle of theirs.
        """
        share, seq_len = batch.input_ids.shape
        before, random_state = settings.micro_batch_size, torch_random_state()

        def undo() -> None:
            for parameter in self.parameters:
                parameter.grad = None
            set_torch_random_state(random_state)

        def smaller(size: int, problem: str) -> int:
            if size == 1:
                raise nothing_smaller(seq_len, problem, self.model.activation_checkpointing)
            half = half_of(share, size)
            if self.world.size > 1:
                self.on_smaller(size, Fit(half, problem))
                raise smaller_start(self.world.rank, size, half, problem)
            return half

        sums, fit = smaller_until_it_fits(
            lambda size: self._backward(batch, size, num_tokens), before, smaller, undo
        )
        if fit.size != before:
            settings.micro_batch_size = fit.size
            self.on_smaller(before, fit)
        return sums

    def _backward(self, batch: Batch, micro_batch_size: int, num_tokens: int) -> Sums:
        """Accumulate gradients of the mean over the whole batch's trained tokens.

        Micro-batches are weighted by their tokens, not equally: each sum is divided by the count
        of the whole batch. Returns those means, and sums of what else the model told.
        """
        total: Sums | None = None
        micro_batches = batch.split(micro_batch_size)
        for number, micro_batch in enumerate(micro_batches, start=1):
            if self.accumulation is not None:
                self.accumulation.before_micro_batch(number == len(micro_batches))
            part = micro_batch.to(self.device)
            isolated = (
                (part.positions, part.document_ids) if self.isolate_documents else (None,) * 2
            )
            sums = self.losses(part.input_ids, part.labels, *isolated)
            objective = sums.loss
            for value in sums.aux_losses.values():
                objective = objective + value
            (objective / num_tokens).backward()
            means = Sums(
                sums.loss.detach() / num_tokens,
                {name: value.detach() / num_tokens for name, value in sums.aux_losses.items()},
                sums.stats,
            )
            total = means if total is None else _added(total, means)
        assert total is not None
        return total

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

    def _even_out_experts(self, stats: dict[str, Tensor]) -> None:
        """Move the biases by which experts are chosen; by the load of the whole batch."""
        load = stats.get("expert_load")
        if load is not None:
            with self.clock.running():
                load = self.world.summed(load)
            self.model.move_selection_biases(load)


def _added(total: Sums, more: Sums) -> Sums:
    return Sums(
        total.loss + more.loss,
        {name: total.aux_losses[name] + value for name, value in more.aux_losses.items()},
        {name: total.stats[name] + value for name, value in more.stats.items()},
    )
