"""Every change to a running training, as typed objects.

The policy, manual control, the exchange between processes, records and audits all use these
objects. torch is imported only where a change is applied, so rules that propose changes work
without it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from ultrathink.core.divisors import largest_divisor
from ultrathink.core.errors import ConfigError
from ultrathink.training.change import (
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    Change,
    Effect,
    checked,
    is_number,
)
from ultrathink.training.endings import STOPPED, returned_to
from ultrathink.training.expert_changes import AddExpert, PruneExpert, ReleaseExperts
from ultrathink.training.snapshots import Snapshot

if TYPE_CHECKING:
    from ultrathink.training.parts import Parts

_POLL_S = 0.1  # during a pause, for new requests


class _LiveSetting(Change):
    """Sets the live setting named ``setting`` to the value of its one field."""

    def apply(self, run: Parts) -> Effect:
        return _set(run, self.name, getattr(self, fields(self)[0].name))


# -- the learning rate and the optimizer -----------------------------------------------------------


@dataclass(frozen=True)
class SetLearningRateFactor(Change):
    """Multiply the scheduled learning rate by `factor`; with `over_steps` the factor returns to 1
    over that many steps."""

    name = "lr_factor"
    factor: float = checked(POSITIVE)
    over_steps: int | None = field(default=None, metadata={"check": COUNT, "may_be_none": True})

    def apply(self, run: Parts) -> Effect:
        settings, step = run.settings, run.progress.step
        before = settings.lr_factor_at(step + 1)
        settings.lr_factor, settings.lr_eases_over = self.factor, self.over_steps
        settings.lr_eases_from = step + 1
        return before, settings.lr_factor


@dataclass(frozen=True)
class ScaleLearningRate(_LiveSetting):
    """Multiply the scheduled rate by `scale` permanently, in addition to other factors."""

    name = "lr_scale"
    scale: float = checked(POSITIVE)


@dataclass(frozen=True)
class CorrectLearningRate(_LiveSetting):
    """Multiply the rate by `factor` to correct a fault; the reported scheduled rate stays."""

    name = "lr_correction"
    factor: float = checked(POSITIVE)


@dataclass(frozen=True)
class RestartSchedule(Change):
    """Restart the learning-rate schedule for the remaining steps."""

    name = "schedule"

    def apply(self, run: Parts) -> Effect:
        before = run.settings.schedule_start
        run.settings.schedule_start = run.progress.step
        run.settings.schedule_ceiling = 1.0
        run.length.follow_settings()
        return before, run.settings.schedule_start


@dataclass(frozen=True)
class SetOptimizerOption(Change):
    """Set an `option` of the optimizer, such as `betas` or `eps`, in every group that has it."""

    name = "optimizer"
    option: str
    value: Any

    @property
    def setting(self) -> str:
        return f"optimizer.{self.option}"

    def apply(self, run: Parts) -> Effect:
        from ultrathink.training.optimizers import set_option

        before = set_option(run.stepper.optimizers, self.option, self.value)
        kept = run.settings.optimizer_params
        configured = kept.get(self.option, [before])[0]
        run.settings.optimizer_params = {**kept, self.option: [configured, self.value]}
        return before, self.value


@dataclass(frozen=True)
class SetWeightDecay(_LiveSetting):
    """Use `weight_decay` for every parameter that is decayed."""

    name = "weight_decay"
    weight_decay: float = checked(NOT_NEGATIVE)


@dataclass(frozen=True)
class SetClip(_LiveSetting):
    """Clip the global gradient norm at `clip`; None stops clipping."""

    name = "clip"
    clip: float | None = checked(POSITIVE, may_be_none=True)


# -- data, memory and the course of the run --------------------------------------------------------


@dataclass(frozen=True)
class SetMicroBatchSize(Change):
    """Split each batch into micro-batches of at most `size` sequences; the batch is unchanged."""

    name = "micro_batch_size"
    is_felt = False
    size: int = checked(COUNT)

    def apply(self, run: Parts) -> Effect:
        return _set(run, "micro_batch_size", largest_divisor(run.share, self.size))


@dataclass(frozen=True)
class SetActivationCheckpointing(Change):
    """Keep every activation for the backward pass (`mode` `none`), products (`selective`) or block
    inputs (`full`): less memory, more time, the same gradients."""

    name = "activation_checkpointing"
    is_felt = False
    mode: str

    def __post_init__(self) -> None:
        from ultrathink.model.activation_checkpointing import check_mode

        check_mode(self.mode)

    def apply(self, run: Parts) -> Effect:
        from ultrathink.training.hardware import forget_most_used

        run.models.set_activation_checkpointing(self.mode)
        forget_most_used()
        return _set(run, "activation_checkpointing", self.mode)


@dataclass(frozen=True)
class ClearMemory(Change):
    """Release memory that the process and its device hold but do not use."""

    name = "clear_memory"
    is_felt = False

    def apply(self, run: Parts) -> Effect:
        import gc

        import torch

        from ultrathink.training.memory import memory_in_use

        before = memory_in_use()["memory"]
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return before, memory_in_use()["memory"]


@dataclass(frozen=True)
class Pause(Change):
    """Wait `seconds` before the next step; any request ends the wait."""

    name = "pause"
    is_felt = False
    seconds: float = checked(POSITIVE)

    def apply(self, run: Parts) -> Effect:
        began = time.monotonic()
        while (waited := time.monotonic() - began) < self.seconds and not run.is_asked():
            time.sleep(min(_POLL_S, self.seconds - waited))
        return self.seconds, time.monotonic() - began


@dataclass(frozen=True)
class SetMixtureWeights(Change):
    """Draw the following samples from the sources in the proportions `weights`."""

    name = "mixture_weights"
    weights: Sequence[float]

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", tuple(self.weights))
        are_numbers = all(is_number(one) and one >= 0 for one in self.weights)
        if not are_numbers or not sum(self.weights) > 0:
            self.refuse("weights", "must be numbers of 0 or above, at least one above 0")

    def apply(self, run: Parts) -> Effect:
        before = list(run.loader.weights)
        run.loader.set_weights(self.weights)
        return before, list(run.loader.weights)


@dataclass(frozen=True)
class SkipSamples(Change):
    """Skip the next `count` samples."""

    name = "skip_samples"
    count: int = checked(COUNT)

    def apply(self, run: Parts) -> Effect:
        before = run.loader.samples_skipped
        run.loader.skip(self.count)
        return before, run.loader.samples_skipped


@dataclass(frozen=True)
class SetEvaluation(_LiveSetting):
    """Validate every `every_steps` steps; None: only at the end."""

    name = "eval_every"
    is_felt = False
    every_steps: int | None = checked(COUNT, may_be_none=True)


@dataclass(frozen=True)
class Rollback(Change):
    """Go back to `snapshot`; with `skip_data` skip the samples that were used since."""

    name = "rollback"
    snapshot: Snapshot
    skip_data: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "snapshot", _snapshot(self.snapshot))

    @property
    def needed(self) -> tuple[Snapshot, ...]:
        return (self.snapshot,)

    def apply(self, run: Parts) -> Effect:
        """Roll back, and remove the checkpoints of the undone steps."""
        before, position = run.progress.step, _position(run)
        if self.snapshot.key not in run.snapshots.states:
            raise ConfigError(f"the snapshot of step {self.snapshot.step} is gone.")
        run.saving.settle()
        run.state.roll_back(run.snapshots.states[self.snapshot.key])
        run.length.reopen()
        passed = position - _position(run)
        if self.skip_data and passed > 0:
            run.loader.skip(passed)
        step = run.progress.step
        if run.world.is_main:
            run.run.remove_after(step)
        run.boundary.is_best = False
        run.boundary.save = step > 0
        return before, step


@dataclass(frozen=True)
class AverageSnapshots(Change):
    """Use the mean of the current weights and those of `snapshots`, unless the validation loss
    gets worse."""

    # arXiv:2209.14981
    name = "average_snapshots"
    snapshots: Sequence[Snapshot]

    def __post_init__(self) -> None:
        object.__setattr__(self, "snapshots", tuple(_snapshot(one) for one in self.snapshots))
        if not self.snapshots:
            self.refuse("snapshots", "must be one or more")

    @property
    def needed(self) -> tuple[Snapshot, ...]:
        return tuple(self.snapshots)

    def apply(self, run: Parts) -> Effect:
        """Returns the validation loss before and after; after is the better of the two."""
        from ultrathink.training.expert_rows import check_same_experts
        from ultrathink.training.host_states import copied_to_host
        from ultrathink.training.model_state import ModulesState, average_weights

        for one in self.snapshots:
            check_same_experts(run.model, run.snapshots.states[one.key], one.step)
        scores = run.held_out()
        if scores is None:
            raise ConfigError(
                "averaging weights needs held-out text to judge the result, and data.val is none."
            )
        before = scores.loss
        weights = ModulesState(run.models.modules)
        alone = copied_to_host(weights.state_dict())
        others = [run.snapshots.states[one.key] for one in self.snapshots]
        average_weights(run.models.modules, others)
        scores = run.held_out()
        assert scores is not None
        after = scores.loss
        if not after < before:
            weights.load_state_dict(alone)
            after = before
        if run.stepper.host is not None:
            run.stepper.host.take_weights()
        return before, after


@dataclass(frozen=True)
class SaveCheckpoint(Change):
    """Write a checkpoint."""

    name = "checkpoint"
    is_felt = False

    def apply(self, run: Parts) -> Effect:
        run.boundary.save = True
        return run.progress.last_checkpoint, run.progress.step


@dataclass(frozen=True)
class Stop(Change):
    """Save and end the run; with `returned_to`, the current step, it is finished until it is
    extended."""

    name = "stop"
    returned_to: int | None = field(default=None, metadata={"check": COUNT, "may_be_none": True})

    def apply(self, run: Parts) -> Effect:
        step, ending = run.progress.step, STOPPED
        if self.returned_to is not None:
            if self.returned_to != step:
                raise ConfigError(f"the run is at step {step}, not {self.returned_to}.")
            run.progress.is_over, ending = True, returned_to(step)
        run.boundary.ending = replace(ending, reason=run.boundary.reason)
        return None, ending.name


# -- experts ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SetRouting(Change):
    """Set a `control` of `model.moe.routing` or `model.moe.balance`, such as `temperature`, in
    every layer."""

    name = "routing"
    control: str
    value: float | None

    def __post_init__(self) -> None:
        from ultrathink.model.experts.controls import check_control

        check_control(self.control, self.value)

    @property
    def setting(self) -> str:
        return f"routing.{self.control}"

    def apply(self, run: Parts) -> Effect:
        routing = run.model.routing
        if routing is None:
            raise ConfigError(
                f"{self.setting} cannot be changed: this model has no experts; model.moe gives it "
                f"some."
            )
        before = routing.get(self.control)
        routing.set(self.control, self.value)
        return before, routing.get(self.control)


@dataclass(frozen=True)
class ReviveExperts(Change):
    """Replace `experts`, each named by `layer`, `group` and `expert` (from 0), by copies of the
    busiest expert of their group and layer."""

    name = "revive_experts"
    experts: Sequence[Mapping[str, Any]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "experts", tuple(dict(one) for one in self.experts))
        if not all({"layer", "group", "expert"} <= one.keys() for one in self.experts):
            self.refuse("experts", "must each have `layer`, `group` and `expert`")

    def apply(self, run: Parts) -> Effect:
        from ultrathink.training.revival import revive_experts

        before, after, run.boundary.expert_load = revive_experts(
            run.stepper,
            self.experts,
            load=run.boundary.expert_load,
            dp_group=run.dp_group,
            seed=(run.loader.seed, run.progress.step),
        )
        return before, after

    def as_applied(self, after: Any) -> Change:
        return ReviveExperts(after)  # it records which expert each was copied from


# -- depth routing ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdjustModCapacity(Change):
    """Let `capacity` of the tokens of a sequence through the layers with depth routing, rounded to
    eighths; this ends the schedule of capacities."""

    name = "adjust_mod_capacity"
    setting = "mod.capacity"
    capacity: float

    def __post_init__(self) -> None:
        from ultrathink.model.depth.controls import check_capacity

        check_capacity(self.capacity)

    def apply(self, run: Parts) -> Effect:
        depth = run.model.depth
        if depth is None:
            raise ConfigError(
                "mod.capacity cannot be changed: this model has no depth routing; model.mod gives "
                "it some."
            )
        before = depth.capacity
        depth.set(self.capacity)
        return before, depth.capacity


# The changes of this module, in this order, and those that are in modules of their own.
CHANGES = (
    *(kind for kind in Change.kinds.values() if kind.__module__ == __name__),
    AddExpert,
    PruneExpert,
    ReleaseExperts,
)


def change_from(values: Mapping[str, Any]) -> Change:
    """The change from the ``values`` that ``to_json`` returned."""
    given = dict(values)
    return Change.kinds[given.pop("change")](**given)


def _set(run: Parts, name: str, value: Any) -> Effect:
    before = getattr(run.settings, name)
    setattr(run.settings, name, value)
    return before, value


def _position(run: Parts) -> int:
    """Samples taken or skipped since the run began."""
    return run.loader.samples_seen + run.loader.samples_skipped


def _snapshot(value: Snapshot | Mapping[str, int]) -> Snapshot:
    return value if isinstance(value, Snapshot) else Snapshot(**value)
