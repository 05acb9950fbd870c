"""Everything that may be done to a run while it trains, by name.

Each method asks for one change, which takes effect before the next step and leaves a record. The
policy uses the same methods as anybody who steers by hand, from within ``Controller.at_boundary``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ultrathink.core.errors import UltrathinkError
from ultrathink.orchestrator.steering.snapshots import Kept, SnapshotRing

if TYPE_CHECKING:
    from ultrathink.training.control import TrainerControl

EASES_OVER = 200  # steps in which a reduced rate returns to the scheduled one
BALANCE = ("load", "importance", "entropy", "z", "bias_rate")


class Interventions:
    """What may be done through ``control``; to go back it needs the rest.

    ``position`` tells how many samples were taken or skipped so far, ``step`` the step it is at.
    """

    def __init__(
        self,
        control: TrainerControl,
        snapshots: SnapshotRing | None = None,
        *,
        position: Callable[[], int] = lambda: 0,
        step: Callable[[], int] = lambda: 0,
    ) -> None:
        self.control = control
        self.snapshots = snapshots
        self._position = position
        self._step = step

    # -- the learning rate and the optimizer ---------------------------------------------------

    def adjust_learning_rate(
        self, factor: float, *, over_steps: int | None = None, reason: str = "by hand"
    ) -> None:
        """Multiply the scheduled rate by ``factor``, which returns to 1 over ``over_steps``."""
        self.control.set_lr_factor(factor, over_steps=over_steps, reason=reason)

    def emergency_lr_reduction(self, divisor: float = 10.0, *, reason: str = "by hand") -> None:
        """Divide the scheduled rate, which comes back over 200 steps."""
        if divisor < 1:
            raise UltrathinkError(f"the divisor of the learning rate must be 1 or more: {divisor}.")
        self.control.set_lr_factor(1 / divisor, over_steps=EASES_OVER, reason=reason)

    def correct_learning_rate(self, factor: float, *, reason: str = "by hand") -> None:
        """Multiply the rate by ``factor`` for as long as it is not the one that is asked for."""
        self.control.set_lr_correction(factor, reason=reason)

    def scale_learning_rate(self, scale: float, *, reason: str = "by hand") -> None:
        """Multiply the scheduled rate by ``scale`` for good, whatever other factors come and go."""
        self.control.set_lr_scale(scale, reason=reason)

    def reset_schedule(self, *, reason: str = "by hand") -> None:
        """Begin the schedule anew for the steps that are left."""
        self.control.reset_schedule(reason=reason)

    def adjust_weight_decay(self, weight_decay: float, *, reason: str = "by hand") -> None:
        """Use another weight decay."""
        self.control.set_weight_decay(weight_decay, reason=reason)

    def adjust_gradient_clip(self, clip: float | None, *, reason: str = "by hand") -> None:
        """Clip the norm of the whole gradient elsewhere; None: not at all."""
        self.control.set_clip(clip, reason=reason)

    def set_optimizer_param(self, name: str, value: Any, *, reason: str = "by hand") -> None:
        """Set an option of the optimizer, such as ``betas``."""
        self.control.set_optimizer_param(name, value, reason=reason)

    # -- data, memory and the course of the run ------------------------------------------------

    def adjust_batch_size(self, micro_batch_size: int, *, reason: str = "by hand") -> None:
        """Split the batch otherwise; the global batch stays, accumulation makes up."""
        self.control.set_micro_batch_size(micro_batch_size, reason=reason)

    def adjust_mixture(self, weights: Sequence[float], *, reason: str = "by hand") -> None:
        """Draw the coming samples from the sources in other proportions."""
        self.control.set_mixture_weights(weights, reason=reason)

    def rollback_steps(self, count: int, *, reason: str = "by hand") -> None:
        """Go back to the best snapshot of the last ``count`` steps, and skip the samples since.

        The best one has the lowest level of the training loss. UltrathinkError where there is none.
        """
        steps, now = self.snapshots.steps if self.snapshots is not None else [], self._step()
        kept = self.snapshots.best_since(now - count) if self.snapshots is not None else None
        if kept is None:
            there = f"there are those of steps {', '.join(map(str, steps))}" if steps else "none is"
            raise UltrathinkError(
                f"there is no snapshot of the last {count} steps to go back to from step {now}; "
                f"{there} kept (orchestrator.mode=act keeps some)."
            )
        self.roll_back_to(kept, reason=reason)

    def roll_back_to(self, kept: Kept, *, skip: bool = True, reason: str = "by hand") -> None:
        """Go back to one snapshot; ``skip`` leaves out the samples that came since."""
        self.control.restore(kept.snapshot, reason=reason)
        passed = self._position() - kept.samples
        if skip and passed > 0:
            self.control.skip_samples(passed, reason=reason)
        if self.snapshots is not None:
            self.snapshots.go_back_to(kept)

    def average_snapshots(self, steps: Sequence[int], *, reason: str = "by hand") -> None:
        """Use the mean of the weights of now and of the snapshots of ``steps``, where held-out
        text is the better for it: what a falling rate would have done, in part."""
        found = [self.snapshots.before(step) for step in steps] if self.snapshots else []
        kept = [one for one in found if one is not None]
        self.control.average_weights([one.snapshot for one in kept], reason=reason)

    def adjust_evaluation(self, every_steps: int | None, *, reason: str = "by hand") -> None:
        """Validate after every so many steps; None: at the end only."""
        self.control.set_eval_every(every_steps, reason=reason)

    def checkpoint_now(self, *, reason: str = "by hand") -> None:
        """Write a checkpoint."""
        self.control.checkpoint_now(reason=reason)

    def set_activation_checkpointing(self, mode: str, *, reason: str = "by hand") -> None:
        """Keep every activation (``none``), products (``selective``) or inputs of blocks alone
        (``full``) for the backward pass: less memory, more time, the same gradients."""
        self.control.set_activation_checkpointing(mode, reason=reason)

    def clear_memory(self, *, reason: str = "by hand") -> None:
        """Give back memory that is held without need."""
        self.control.clear_memory(reason=reason)

    def pause(self, seconds: float, *, reason: str = "by hand") -> None:
        """Wait before the next step."""
        self.control.pause(seconds, reason=reason)

    def stop(self, *, reason: str = "by hand") -> None:
        """End the run after saving it."""
        self.control.stop(reason=reason)

    # -- experts -------------------------------------------------------------------------------

    def adjust_capacity_factor(self, factor: float | None, *, reason: str = "by hand") -> None:
        """Let an expert take so many times its even share; None: whatever comes."""
        self.control.set_routing("capacity_factor", factor, reason=reason)

    def adjust_routing_temperature(self, temperature: float, *, reason: str = "by hand") -> None:
        """Divide router logits by ``temperature``."""
        self.control.set_routing("temperature", temperature, reason=reason)

    def adjust_router_jitter(self, jitter: float, *, reason: str = "by hand") -> None:
        """Multiply router inputs by noise of this width."""
        self.control.set_routing("jitter", jitter, reason=reason)

    def enable_expert_dropout(self, share: float, *, reason: str = "by hand") -> None:
        """Hide each expert from a token with this probability; 0 ends it."""
        self.control.set_routing("expert_dropout", share, reason=reason)

    def revive_expert(
        self, *, layer: int, group: str, expert: int, reason: str = "by hand"
    ) -> None:
        """Begin an expert anew as a copy of the busiest of its group in that layer.

        ``layer`` counts the model's layers, ``expert`` those of the group, both from 0.
        """
        self.revive_experts([{"layer": layer, "group": group, "expert": expert}], reason=reason)

    def revive_experts(
        self, experts: Sequence[Mapping[str, Any]], *, reason: str = "by hand"
    ) -> None:
        """Begin several experts anew, each named by ``layer``, ``group`` and ``expert``."""
        self.control.revive_experts(experts, reason=reason)

    def adjust_balance_weights(self, *, reason: str = "by hand", **weights: float) -> None:
        """Weigh the balancing losses otherwise: load, importance, entropy, z, bias_rate."""
        for name, weight in weights.items():
            if name not in BALANCE:
                raise UltrathinkError(
                    f"there is no balancing loss {name!r}; there are {', '.join(BALANCE)}."
                )
            self.control.set_routing(name, weight, reason=reason)
