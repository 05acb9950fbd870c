"""What each request of ``TrainerControl`` does to a trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ultrathink.core.divisors import largest_divisor
from ultrathink.core.errors import ConfigError
from ultrathink.training.control import Change

if TYPE_CHECKING:
    from ultrathink.training.trainer import Trainer

# Each applies a value and returns what it was before and what it is now.
Apply = Callable[["Trainer", Any], tuple[Any, Any]]


def apply_change(trainer: Trainer, setting: str, value: Any, reason: str) -> Change | None:
    """Apply one request at a step boundary; returns its record, where it changes anything."""
    if setting == "snapshot":
        trainer.snapshots[value] = trainer.copied_state()
        return None
    if setting == "forget":
        trainer.snapshots.pop(value, None)
        return None
    before, after = _APPLY[setting](trainer, value)
    if setting == "routing":
        setting = f"routing.{value[0]}"
    return Change(trainer.progress.step, setting, before, after, reason)


def _live_setting(name: str) -> Apply:
    def apply(trainer: Trainer, value: Any) -> tuple[Any, Any]:
        before = getattr(trainer.settings, name)
        setattr(trainer.settings, name, value)
        return before, value

    return apply


def _micro_batch_size(trainer: Trainer, size: int) -> tuple[int, int]:
    """Use the largest divisor of the batch that is not above ``size``."""
    before = trainer.settings.micro_batch_size
    share = trainer.training.batch_size // trainer.world.size
    trainer.settings.micro_batch_size = largest_divisor(share, size)
    return before, trainer.settings.micro_batch_size


def _mixture_weights(trainer: Trainer, weights: list[float]) -> tuple[list[float], list[float]]:
    before = list(trainer.loader.weights)
    trainer.loader.set_weights(weights)
    return before, list(trainer.loader.weights)


def _routing(
    trainer: Trainer, change: tuple[str, float | None]
) -> tuple[float | None, float | None]:
    """Change one live value of the router's."""
    routing = trainer.model.routing
    if routing is None:
        raise ConfigError(
            f"routing.{change[0]} cannot be changed: this model has no experts; model.moe gives it "
            f"some."
        )
    before = routing.get(change[0])
    routing.set(*change)
    return before, routing.get(change[0])


def _skip_samples(trainer: Trainer, count: int) -> tuple[int, int]:
    before = trainer.loader.samples_skipped
    trainer.loader.skip(count)
    return before, trainer.loader.samples_skipped


def _restore(trainer: Trainer, key: int) -> tuple[int, int]:
    """Go back, and make the checkpoints on disk those of the history that counts now."""
    before = trainer.progress.step
    trainer.saving.settle()
    trainer.load_state_dict(trainer.snapshots[key])
    step = trainer.progress.step
    if trainer.world.is_main:
        trainer.run.remove_after(step)
    trainer.is_best = False
    trainer.save_wanted = step > 0
    return before, step


def _checkpoint(trainer: Trainer, _: None) -> tuple[int, int]:
    trainer.save_wanted = True
    return trainer.progress.last_checkpoint, trainer.progress.step


def _stop(trainer: Trainer, _: None) -> tuple[None, str]:
    trainer.ending = "stopped"
    return None, "stopped"


_APPLY: dict[str, Apply] = {
    "lr_factor": _live_setting("lr_factor"),
    "weight_decay": _live_setting("weight_decay"),
    "clip": _live_setting("clip"),
    "micro_batch_size": _micro_batch_size,
    "mixture_weights": _mixture_weights,
    "routing": _routing,
    "skip_samples": _skip_samples,
    "restore": _restore,
    "checkpoint": _checkpoint,
    "stop": _stop,
}
