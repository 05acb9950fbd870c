"""How a run is changed while it runs: typed requests, applied at a step boundary, each recorded."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol, TypeAlias

from ultrathink.core.errors import UltrathinkError
from ultrathink.core.protocols import State
from ultrathink.model.experts.controls import check_control


@dataclass
class LiveSettings:
    """What may change during a run; part of every checkpoint."""

    lr_factor: float = 1.0
    weight_decay: float | None = None  # None: as configured
    clip: float | None = None
    micro_batch_size: int = 1
    # What a resume with another schedule or length leaves behind, so that the rate never jumps up.
    schedule_start: int = 0  # the schedule begins after this step
    schedule_ceiling: float = 1.0  # largest factor that the schedule may give

    def state_dict(self) -> State:
        return asdict(self)

    def load_state_dict(self, state: State) -> None:
        for field in fields(self):
            setattr(self, field.name, state[field.name])


@dataclass(frozen=True)
class Change:
    """The record of one change: what it was before and after, and why."""

    step: int  # the change holds from the step after this one
    setting: str
    before: Any
    after: Any
    reason: str


@dataclass(frozen=True)
class Snapshot:
    """Stands for a run's whole state in memory, as long as anybody holds it.

    Each process keeps its own part of the state under ``key``.
    """

    step: int
    key: int


class TrainerControl(Protocol):
    """What a controller may do to a run. A request takes effect before the next step."""

    def set_lr_factor(self, factor: float, *, reason: str) -> None:
        """Multiply the scheduled learning rate of every group by ``factor``."""

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

    def skip_samples(self, count: int, *, reason: str) -> None:
        """Leave out the next ``count`` samples."""

    def snapshot(self) -> Snapshot:
        """Copy the whole state (weights, optimizer, data position, random state).

        The copy is taken at this step boundary, before anything else that was asked for.
        """

    def restore(self, snapshot: Snapshot, *, reason: str) -> None:
        """Return to ``snapshot``, all of it."""

    def checkpoint_now(self, *, reason: str) -> None:
        """Write a checkpoint."""

    def stop(self, *, reason: str) -> None:
        """End the run after saving it."""


Request: TypeAlias = tuple[str, Any, str]  # setting, value, reason


class ControlQueue:
    """Requests that wait for the step boundary; ``TrainerControl`` for everyone but the trainer.

    ``step`` tells the step of the boundary. A request is plain values, so that it can be sent to
    other processes.
    """

    def __init__(self, step: Callable[[], int]) -> None:
        self._step = step
        self._keys = itertools.count()
        self._pending: list[Request] = []

    @property
    def num_waiting(self) -> int:
        """Requests that were not taken yet."""
        return len(self._pending)

    def set_lr_factor(self, factor: float, *, reason: str) -> None:
        self._ask("lr_factor", _positive("the learning-rate factor", factor), reason)

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

    def skip_samples(self, count: int, *, reason: str) -> None:
        self._ask("skip_samples", int(_positive("the number of samples", count)), reason)

    def snapshot(self) -> Snapshot:
        snapshot = Snapshot(self._step(), next(self._keys))
        self._ask("snapshot", snapshot.key, "")
        weakref.finalize(snapshot, self._ask, "forget", snapshot.key, "").atexit = False
        return snapshot

    def restore(self, snapshot: Snapshot, *, reason: str) -> None:
        self._ask("restore", snapshot.key, reason)

    def checkpoint_now(self, *, reason: str) -> None:
        self._ask("checkpoint", None, reason)

    def stop(self, *, reason: str) -> None:
        self._ask("stop", None, reason)

    def take(self) -> list[Request]:
        """The waiting requests, snapshots first, then the oldest; the queue is empty after."""
        pending, self._pending = self._pending, []
        return sorted(pending, key=lambda request: request[0] != "snapshot")

    def put(self, requests: Sequence[Request]) -> None:
        """Add requests that came from elsewhere."""
        self._pending += [(setting, value, reason) for setting, value, reason in requests]

    def _ask(self, setting: str, value: Any, reason: str) -> None:
        self._pending.append((setting, value, reason))


def _positive(what: str, value: float) -> float:
    if not value > 0:
        raise UltrathinkError(f"{what} must be above 0, not {value}.")
    return value
