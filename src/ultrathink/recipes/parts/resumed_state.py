"""What changes of a run's configuration do to its state, and which cannot be made."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from ultrathink.config.overrides import parse_override
from ultrathink.config.schema import Config, flatten
from ultrathink.config.training import BUDGETS
from ultrathink.core.errors import CheckpointError, UltrathinkError
from ultrathink.core.protocols import State
from ultrathink.recipes.parts.resumed_data import touches
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.segments import ConfigChange
from ultrathink.training.budget import Budget
from ultrathink.training.schedules import ceiling_at, continued_schedule
from ultrathink.training.settings import LiveSettings
from ultrathink.training.trainer import Trainer

_LENGTHS = tuple(f"training.{name}" for name in (*BUDGETS, "step_budget"))
# What a length given in other units comes to in steps depends on these as well.
_STEP_SIZES = ("training.batch_size", "data.seq_len", "data.train")

# Sections and keys that a run is bound to, and why.
_FIXED = {
    "model": "the weights would no longer fit or mean what they did",
    "tokenizer": "the token ids would stand for other text",
    "run.seed": "it decides the order of the data",
    "training.init_from": "the run has weights of its own by now",
}
# Keys of a fixed section that may change all the same.
_FREE = (
    "model.attention",
    "model.dropout",
    "model.z_loss",
    *(f"model.moe.{name}" for name in ("routing", "balance", "backend")),
    "model.rope_theta",
    "model.rope_scaling",
)


def check_overrides(overrides: Sequence[str], config: Config, run: RunFolder) -> None:
    """Refuse a value that a run is bound to, saying why and what to do instead."""
    values = flatten(config.model_dump(mode="json"))
    for override in overrides:
        key, value = parse_override(override)
        if values.get(key, ...) == value or _is_inside(key, _FREE):
            continue
        for fixed, reason in _FIXED.items():
            if _is_inside(key, (fixed,)):
                raise UltrathinkError(
                    f"{key} cannot change while a run goes on: {reason}. For a new run with the "
                    f"weights of this one: ultrathink train CONFIG {override} "
                    f"training.init_from={run.path}"
                )


def check_changes(changes: Sequence[ConfigChange], reset: Collection[str], step: int) -> None:
    """Refuse changes that need more than was asked for, or leave nothing to do."""
    for change in changes:
        if change.key == "training.optimizer" and "optimizer" not in reset:
            raise UltrathinkError(
                f"training.optimizer.type: {change.before['type']} -> {change.after['type']}: "
                f"what the one remembers does not fit the other; begin it anew with "
                f"--reset optimizer."
            )
        if change.key == "training.max_steps" and change.after is not None and change.after <= step:
            raise UltrathinkError(
                f"training.max_steps={change.after}: the run is at step {step} already; give more, "
                f"or resume from an earlier checkpoint: --resume RUN@STEP."
            )


def _is_inside(key: str, sections: Sequence[str]) -> bool:
    return any(f"{key}.".startswith(f"{section}.") for section in sections)


def is_new_length(changes: Sequence[ConfigChange]) -> bool:
    """Whether the run was given another length."""
    return touches(changes, *_LENGTHS)


def adapt_state(
    state: State,
    trainer: Trainer,
    before: Config,
    changes: Sequence[ConfigChange],
    reset: Collection[str],
    *,
    other_scores: bool,
) -> None:
    """Change ``state``, read from a checkpoint, to what ``trainer`` is to go on with."""
    values: dict[str, Any] = state
    settings, progress = values["settings"], values["progress"]
    _check_identity(values["identity"], trainer.identity, reset)
    _adapt_schedule(values, before, changes, reset)
    if "optimizer" in reset:
        values["optimizer"] = {}
    if "data" in reset:
        values["data"] = trainer.loader.state_dict()
    if touches(changes, "training.optimizer.weight_decay", "training.optimizer"):
        settings["weight_decay"] = None
    if touches(changes, "training.optimizer.lr", "training.optimizer"):
        settings["lr_scale"] = 1.0  # it was found for the rate of before
    if touches(changes, "training.clip"):
        settings["clip"] = trainer.settings.clip
    if touches(changes, "training.micro_batch_size", "training.batch_size"):
        settings["micro_batch_size"] = trainer.settings.micro_batch_size
    if touches(changes, "training.activation_checkpointing"):
        settings["activation_checkpointing"] = trainer.settings.activation_checkpointing
    if touches(changes, "training.eval.every_steps"):
        settings["eval_every"] = trainer.settings.eval_every
    _adapt_routing(values["model"], trainer, changes)
    if other_scores or touches(changes, "training.checkpoint.best_by"):
        progress["best"] = None  # it does not compare with those to come


def _adapt_routing(
    weights: dict[str, Any], trainer: Trainer, changes: Sequence[ConfigChange]
) -> None:
    """Let the live controls of routing that were configured anew be as configured."""
    if trainer.model.routing is None:
        return
    for name, value in trainer.model.routing.named_buffers():
        if touches(changes, f"model.moe.routing.{name}", f"model.moe.balance.{name}"):
            weights[f"routing.{name}"] = value.clone()


def _adapt_schedule(
    values: dict[str, Any],
    before: Config,
    changes: Sequence[ConfigChange],
    reset: Collection[str],
) -> None:
    """Let another schedule or length begin where the old one stands, never above it."""
    settings, step = values["settings"], values["progress"]["step"]
    budget = Budget(**values["budget"])
    other_length = touches(changes, *_LENGTHS, *_STEP_SIZES)
    if other_length:
        values["budget"] = None  # resolved when training starts
    if "schedule" in reset:
        settings["schedule_start"], settings["schedule_ceiling"] = step, 1.0
    elif other_length or touches(changes, "training.schedule"):
        old = LiveSettings()
        old.load_state_dict(settings)
        schedule = continued_schedule(before.training.schedule, budget, old)
        settings["schedule_ceiling"] = ceiling_at(schedule, step, old.schedule_ceiling)


_IDENTITIES = {
    "tokenizer_hash": ("the tokenizer", "put the run's tokenizer folder back as it was"),
    "tokenizer_behavior": (
        "the code that tokenizes",
        "use the version of ultrathink that began the run (manifest.json)",
    ),
    "data_hash": ("the data", "put the files back as they were"),
    "order_hash": (
        "the code that orders and packs samples",
        "use the version of ultrathink that began the run (manifest.json), or let the data begin "
        "anew with --reset data",
    ),
}


def _check_identity(recorded: dict[str, Any], here: dict[str, Any], reset: Collection[str]) -> None:
    """Refuse to go on with other data or another tokenizer than the checkpoint was made with."""
    for name, (what, advice) in _IDENTITIES.items():
        if name in ("data_hash", "order_hash") and "data" in reset:
            continue
        if recorded.get(name) != here[name]:
            raise CheckpointError(
                f"{what} changed since the checkpoint was written (hash "
                f"{str(recorded.get(name))[:12]} then, {str(here[name])[:12]} now), so the run "
                f"cannot go on where it stopped; {advice}, or start a new run with its weights: "
                f"training.init_from=RUN."
            )
