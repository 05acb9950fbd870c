"""What each request of ``TrainerControl`` does to a trainer."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ultrathink.core.divisors import largest_divisor
from ultrathink.core.errors import ConfigError
from ultrathink.parallel.placement import placed_like
from ultrathink.training.control import Change, Request
from ultrathink.training.endings import STOPPED
from ultrathink.training.hardware import forget_most_used
from ultrathink.training.host_states import copied_to_host
from ultrathink.training.memory import memory_in_use
from ultrathink.training.optimizers import set_option
from ultrathink.training.revival import revive_experts
from ultrathink.training.run_state import return_to

if TYPE_CHECKING:
    from ultrathink.training.trainer import Trainer

# Each applies a value and returns what it was before and what it is now.
Apply = Callable[["Trainer", Any], tuple[Any, Any]]


_PAUSE_S = 0.1  # between looks at whether anything was asked for


def apply_change(trainer: Trainer, request: Request) -> Change | None:
    """Apply one request at a step boundary; returns its record, where it changes anything."""
    setting, value, reason, decision = request
    if setting == "snapshot":
        key, in_checkpoints = value
        trainer.snapshots.take(key, trainer.state_dict())
        if in_checkpoints:
            trainer.carried.add(key)
        return None
    if setting == "forget":
        trainer.snapshots.pop(value, None)
        trainer.carried.discard(value)
        return None
    if setting == "keep_state":
        name, key, newest = value
        state = trainer.state_dict() if key is None else trainer.snapshots[key]
        trainer.saving.keep_state(name, state, newest=newest)
        return None
    if setting == "stop":
        trainer.ending = replace(STOPPED, reason=reason)
        return Change(trainer.progress.step, setting, None, STOPPED.name, reason, decision)
    trainer.snapshots.before_writing()
    before, after = _APPLY[setting](trainer, value)
    if setting == "routing":
        setting = f"routing.{value[0]}"
    if setting == "optimizer_param":
        setting = f"optimizer.{value[0]}"
    return Change(trainer.progress.step, setting, before, after, reason, decision)


def _live_setting(name: str) -> Apply:
    def apply(trainer: Trainer, value: Any) -> tuple[Any, Any]:
        before = getattr(trainer.settings, name)
        setattr(trainer.settings, name, value)
        return before, value

    return apply


def _lr_factor(trainer: Trainer, value: tuple[float, int | None]) -> tuple[float, float]:
    settings, step = trainer.settings, trainer.progress.step
    before = settings.lr_factor_at(step + 1)
    settings.lr_factor, settings.lr_eases_over = value
    settings.lr_eases_from = step + 1
    return before, settings.lr_factor


def _optimizer_param(trainer: Trainer, value: tuple[str, Any]) -> tuple[Any, Any]:
    """Set an option in every group of every optimizer that has it."""
    name, new = value
    before = set_option(trainer.stepper.optimizers, name, new)
    kept = trainer.settings.optimizer_params
    trainer.settings.optimizer_params = {**kept, name: [kept.get(name, [before])[0], new]}
    return before, new


def _reset_schedule(trainer: Trainer, _: None) -> tuple[int, int]:
    assert trainer.budget is not None
    before = trainer.settings.schedule_start
    trainer.settings.schedule_start = trainer.progress.step
    trainer.settings.schedule_ceiling = 1.0
    trainer.set_budget(trainer.budget)
    return before, trainer.settings.schedule_start


def _activation_checkpointing(trainer: Trainer, mode: str) -> tuple[str, str]:
    """A compiled step is compiled once more, as its next batch comes."""
    before = trainer.settings.activation_checkpointing
    trainer.settings.activation_checkpointing = mode
    trainer.model.set_activation_checkpointing(mode)
    forget_most_used()
    return before, mode


def _clear_memory(trainer: Trainer, _: None) -> tuple[float, float]:
    """Returns GiB in use."""
    before = memory_in_use()["memory"]
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return before, memory_in_use()["memory"]


def _pause(trainer: Trainer, seconds: float) -> tuple[float, float]:
    """Returns the seconds asked for and waited; a run of several processes waits together."""
    began = time.monotonic()
    while (waited := time.monotonic() - began) < seconds and not trainer.control.num_waiting:
        time.sleep(min(_PAUSE_S, seconds - waited))
    return seconds, time.monotonic() - began


def _micro_batch_size(trainer: Trainer, size: int) -> tuple[int, int]:
    """Use the largest divisor of the batch that is not above ``size``."""
    before = trainer.settings.micro_batch_size
    share = trainer.dims.share(trainer.training.batch_size)
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
    return_to(trainer, trainer.snapshots[key])
    assert trainer.budget is not None
    if trainer.training.max_minutes is not None and trainer.training.step_budget is None:
        # The steps are taken once more, and the minutes are not: fewer fit in.
        trainer.budget = replace(trainer.budget, is_settled=False, looks=0)
    trainer.set_budget(trainer.budget)  # the schedule follows from the settings of then
    step = trainer.progress.step
    if trainer.world.is_main:
        trainer.run.remove_after(step)
    trainer.is_best = False
    trainer.save_wanted = step > 0
    return before, step


def _average(trainer: Trainer, keys: list[int]) -> tuple[float, float]:
    """Returns the validation loss before and after, which is the better of the two."""
    if trainer.held_out is None:
        raise ConfigError(
            "weights are averaged by what held-out text says of it, and data.val is none."
        )
    alone = copied_to_host(dict(trainer.model.state_dict()))
    before = trainer.score(trainer.held_out).loss
    others: list[Any] = [trainer.snapshots[key]["model"] for key in keys]
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            for other in others:
                weight.add_(placed_like(other[name], weight).to(weight.device))
            weight.div_(len(others) + 1)
    after = trainer.score(trainer.held_out).loss
    if not after < before:
        weights = trainer.model.state_dict()
        trainer.model.load_state_dict(
            {name: placed_like(value, weights[name]) for name, value in alone.items()}
        )
        after = before
    if trainer.stepper.host is not None:
        trainer.stepper.host.take_weights()
    return before, after


def _checkpoint(trainer: Trainer, _: None) -> tuple[int, int]:
    trainer.save_wanted = True
    return trainer.progress.last_checkpoint, trainer.progress.step


_APPLY: dict[str, Apply] = {
    "lr_factor": _lr_factor,
    "lr_scale": _live_setting("lr_scale"),
    "lr_correction": _live_setting("lr_correction"),
    "optimizer_param": _optimizer_param,
    "schedule": _reset_schedule,
    "eval_every": _live_setting("eval_every"),
    "activation_checkpointing": _activation_checkpointing,
    "clear_memory": _clear_memory,
    "pause": _pause,
    "weight_decay": _live_setting("weight_decay"),
    "clip": _live_setting("clip"),
    "micro_batch_size": _micro_batch_size,
    "mixture_weights": _mixture_weights,
    "routing": _routing,
    "revive_expert": revive_experts,
    "skip_samples": _skip_samples,
    "restore": _restore,
    "average": _average,
    "checkpoint": _checkpoint,
}
