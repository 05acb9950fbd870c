"""How a run is changed while it runs: typed requests, applied at a step boundary, each recorded."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from ultrathink.core.errors import UltrathinkError
from ultrathink.model.activation_checkpointing import check_mode
from ultrathink.model.experts.controls import check_control


@dataclass(frozen=True)
class Snapshot:
    """Stands for a run's whole state in memory, as long as anybody holds it.

    Each process keeps its own part of the state under ``key``.
    """

    step: int
    key: int


class TrainerControl(Protocol):
    """What a controller may do to a run. A request takes effect before the next step."""

    def set_lr_factor(self, factor: float, *, over_steps: int | None = None, reason: str) -> None:
        """Multiply the scheduled learning rate of every group by ``factor``.

        With ``over_steps`` the factor returns to 1 over so many steps.
        """

    def set_lr_scale(self, scale: float, *, reason: str) -> None:
        """Multiply the scheduled rate by ``scale`` for good, beside other factors."""

    def set_lr_correction(self, factor: float, *, reason: str) -> None:
        """Multiply the rate by ``factor`` to make up for a fault: what is reported as the scheduled
        rate stays."""

    def set_optimizer_param(self, name: str, value: Any, *, reason: str) -> None:
        """Set an option of the optimizer, such as ``betas`` or ``eps``, in every group with it."""

    def reset_schedule(self, *, reason: str) -> None:
        """Let the schedule of the learning rate begin anew for the steps that are left."""

    def set_eval_every(self, steps: int | None, *, reason: str) -> None:
        """Validate after every ``steps`` steps; None: only at the end."""

    def set_activation_checkpointing(self, mode: str, *, reason: str) -> None:
        """Keep every activation for the backward pass (``none``), the products (``selective``) or
        each block's input (``full``)."""

    def clear_memory(self, *, reason: str) -> None:
        """Give back what the process and its device hold without need."""

    def pause(self, seconds: float, *, reason: str) -> None:
        """Wait so long before the next step; anything asked of the run ends the wait."""

    def set_weight_decay(self, weight_decay: float, *, reason: str) -> None:
        """Use ``weight_decay`` for every parameter that is decayed."""

    def set_clip(self, clip: float | None, *, reason: str) -> None:
        """Clip the global gradient norm at ``clip``; None stops clipping."""

    def set_micro_batch_size(self, size: int, *, reason: str) -> None:
        """Split each batch into micro-batches of ``size`` sequences; the batch stays the same."""

    def set_mixture_weights(self, weights: Sequence[float], *, reason: str) -> None:
        """Draw the coming samples from the sources in these proportions."""

    def set_routing(self, name: str, value: float | None, *, reason: str) -> None:
        """Change how tokens find experts, in every layer: a value of ``model.moe.routing`` or
        ``model.moe.balance`` by its name (``capacity_factor`` may be None)."""

    def revive_experts(self, experts: Sequence[Mapping[str, Any]], *, reason: str) -> None:
        """Begin experts anew, each as a copy of the busiest one of its layer and group.

        Each is named by ``layer``, ``group`` and its number ``expert`` in that.
        """

    def skip_samples(self, count: int, *, reason: str) -> None:
        """Leave out the next ``count`` samples."""

    def snapshot(self, *, in_checkpoints: bool = False) -> Snapshot:
        """Copy the whole state (weights, optimizer, data position, random state).

        The copy is taken at this step boundary, before anything else that was asked for. Those
        ``in_checkpoints`` outlive a resume, where ``brought_back`` finds them.
        """

    def brought_back(self, step: int) -> Snapshot | None:
        """The snapshot of ``step`` that the checkpoint held with which the run was resumed, to
        whoever asks first."""

    def restore(self, snapshot: Snapshot, *, reason: str) -> None:
        """Return to ``snapshot``, all of it."""

    def average_weights(self, snapshots: Sequence[Snapshot], *, reason: str) -> None:
        """Use the mean of the weights of now and of ``snapshots``, unless held-out text is the
        worse for it (arXiv:2209.14981)."""

    def keep_state(self, name: str, snapshot: Snapshot | None = None, *, newest: int) -> None:
        """Write the state of now, or of ``snapshot``, to the run's folder ``states/NAME``.

        Of such folders the ``newest`` by name stay.
        """

    def checkpoint_now(self, *, reason: str) -> None:
        """Write a checkpoint."""

    def stop(self, *, reason: str) -> None:
        """End the run after saving it."""


class Request(NamedTuple):
    """Something that is asked of a run: plain values, so that it can be sent to other processes."""

    setting: str
    value: Any
    reason: str
    decision: int | None = None


class ControlQueue:
    """Requests that wait for the step boundary; ``TrainerControl`` for everyone but the trainer.

    ``step`` tells the step of the boundary.
    """

    def __init__(self, step: Callable[[], int]) -> None:
        self._step = step
        self._keys = itertools.count()
        self._pending: list[Request] = []
        self._decision: int | None = None
        self._brought_back: dict[int, Snapshot] = {}

    @contextmanager
    def deciding(self, number: int) -> Iterator[None]:
        """What is asked for inside belongs to the decision ``number``."""
        self._decision = number
        try:
            yield
        finally:
            self._decision = None

    @property
    def step(self) -> int:
        """The step of the boundary."""
        return self._step()

    @property
    def num_waiting(self) -> int:
        """Requests that were not taken yet."""
        return len(self._pending)

    def set_lr_factor(self, factor: float, *, over_steps: int | None = None, reason: str) -> None:
        factor = _positive("the learning-rate factor", factor)
        if over_steps is not None:
            _positive("the number of steps over which the factor returns to 1", over_steps)
        self._ask("lr_factor", [factor, over_steps], reason)

    def set_lr_scale(self, scale: float, *, reason: str) -> None:
        self._ask("lr_scale", _positive("the scale of the learning rate", scale), reason)

    def set_lr_correction(self, factor: float, *, reason: str) -> None:
        self._ask("lr_correction", _positive("the correction of the rate", factor), reason)

    def set_optimizer_param(self, name: str, value: Any, *, reason: str) -> None:
        self._ask("optimizer_param", [name, value], reason)

    def reset_schedule(self, *, reason: str) -> None:
        self._ask("schedule", None, reason)

    def set_eval_every(self, steps: int | None, *, reason: str) -> None:
        if steps is not None:
            steps = int(_positive("the number of steps between validations", steps))
        self._ask("eval_every", steps, reason)

    def set_activation_checkpointing(self, mode: str, *, reason: str) -> None:
        self._ask("activation_checkpointing", check_mode(mode), reason)

    def clear_memory(self, *, reason: str) -> None:
        self._ask("clear_memory", None, reason)

    def pause(self, seconds: float, *, reason: str) -> None:
        self._ask("pause", _positive("the pause", seconds), reason)

    def set_weight_decay(self, weight_decay: float, *, reason: str) -> None:
        if weight_decay < 0:
            raise UltrathinkError(f"weight decay {weight_decay} is negative; use 0 or more.")
        self._ask("weight_decay", weight_decay, reason)

    def set_clip(self, clip: float | None, *, reason: str) -> None:
        self._ask("clip", clip if clip is None else _positive("the clip", clip), reason)

    def set_micro_batch_size(self, size: int, *, reason: str) -> None:
        self._ask("micro_batch_size", int(_positive("the micro-batch size", size)), reason)

    def set_mixture_weights(self, weights: Sequence[float], *, reason: str) -> None:
        self._ask("mixture_weights", [float(weight) for weight in weights], reason)

    def set_routing(self, name: str, value: float | None, *, reason: str) -> None:
        check_control(name, value)
        self._ask("routing", [name, value], reason)

    def revive_experts(self, experts: Sequence[Mapping[str, Any]], *, reason: str) -> None:
        self._ask("revive_expert", [dict(one) for one in experts], reason)

    def skip_samples(self, count: int, *, reason: str) -> None:
        self._ask("skip_samples", int(_positive("the number of samples", count)), reason)

    def snapshot(self, *, in_checkpoints: bool = False) -> Snapshot:
        snapshot = self._new_snapshot(self._step())
        self._ask("snapshot", [snapshot.key, in_checkpoints], "")
        return snapshot

    def bring_back(self, step: int) -> Snapshot:
        """Let ``brought_back`` find a snapshot of ``step``, whose state the caller has."""
        self._brought_back[step] = snapshot = self._new_snapshot(step)
        return snapshot

    def brought_back(self, step: int) -> Snapshot | None:
        return self._brought_back.pop(step, None)

    def is_asked(self, setting: str) -> bool:
        """Whether a change of ``setting`` waits."""
        return any(request.setting == setting for request in self._pending)

    def _new_snapshot(self, step: int) -> Snapshot:
        snapshot = Snapshot(step, next(self._keys))
        # Not the queue itself: it would keep the run, and so the snapshot, for ever.
        forget = weakref.finalize(snapshot, _forget, weakref.ref(self), snapshot.key)
        forget.atexit = False
        return snapshot

    def restore(self, snapshot: Snapshot, *, reason: str) -> None:
        self._ask("restore", snapshot.key, reason)

    def average_weights(self, snapshots: Sequence[Snapshot], *, reason: str) -> None:
        self._ask("average", [snapshot.key for snapshot in snapshots], reason)

    def keep_state(self, name: str, snapshot: Snapshot | None = None, *, newest: int) -> None:
        key = snapshot.key if snapshot is not None else None
        self._ask("keep_state", [name, key, newest], "")

    def checkpoint_now(self, *, reason: str) -> None:
        self._ask("checkpoint", None, reason)

    def stop(self, *, reason: str) -> None:
        self._ask("stop", None, reason)

    def take(self) -> list[Request]:
        """The waiting requests, snapshots first, then the oldest; the queue is empty after."""
        pending, self._pending = self._pending, []
        return sorted(pending, key=lambda request: request.setting != "snapshot")

    def put(self, requests: Sequence[Request]) -> None:
        """Add requests that came from elsewhere."""
        self._pending += [Request(*request) for request in requests]

    def _ask(self, setting: str, value: Any, reason: str) -> None:
        self._pending.append(Request(setting, value, reason, self._decision))


def _forget(queue: weakref.ref[ControlQueue], key: int) -> None:
    """Nobody can ask for the snapshot ``key`` any more."""
    found = queue()
    if found is not None:
        found.put([Request("forget", key, "")])


def _positive(what: str, value: float) -> float:
    if not value > 0:
        raise UltrathinkError(f"{what} must be above 0, not {value}.")
    return value
