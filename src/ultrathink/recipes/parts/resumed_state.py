"""Applies changes of a run's configuration to its state, and refuses impossible ones."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor

from ultrathink.config.overrides import flatten, parse_override
from ultrathink.config.reflection import field_at, rule_of
from ultrathink.config.schema import Config
from ultrathink.core.errors import CheckpointError, UltrathinkError
from ultrathink.core.protocols import State
from ultrathink.model.transformer import Transformer
from ultrathink.recipes.parts.resumed_data import decided, touches
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.segments import ConfigChange
from ultrathink.training.budget import Budget
from ultrathink.training.model_set import ModelSet
from ultrathink.training.model_state import MODULES
from ultrathink.training.parts import Parts
from ultrathink.training.schedules import ceiling_at, continued_schedule
from ultrathink.training.settings import LiveSettings


def check_overrides(overrides: Sequence[str], config: Config, run: RunFolder) -> None:
    """Refuse a change of a value that a run must keep; says why and what to do instead."""
    values = flatten(config.model_dump(mode="json"))
    for override in overrides:
        name, given = parse_override(override)
        for key, value in flatten(given, name).items():
            if values.get(key, ...) == value or field_at(Config, key.split("."), None) is None:
                continue
            rule = rule_of(Config, key)
            if rule.rule == "fixed":
                raise UltrathinkError(
                    f"{key} cannot change to {value} in a resumed run: {rule.because}; "
                    f"start a new run with it: ultrathink train CONFIG {override} "
                    f"(with training.init_from={run.path} from these weights)."
                )


def check_changes(changes: Sequence[ConfigChange], reset: Collection[str], step: int) -> None:
    """Refuse changes that need a reset, or leave nothing to train."""
    for change in changes:
        if change.key == "training.optimizer" and "optimizer" not in reset:
            raise UltrathinkError(
                f"training.optimizer.type: {change.before['type']} -> {change.after['type']}: "
                f"the optimizer states are incompatible; restart it with --reset optimizer."
            )
        if change.key == "training.max_steps" and change.after is not None and change.after <= step:
            raise UltrathinkError(
                f"training.max_steps={change.after}: the run is at step {step} already; give more, "
                f"or resume from an earlier checkpoint: --resume RUN@STEP."
            )


# Live settings that follow the configuration where one of these keys changed.
_SETTINGS = {
    "clip": ("training.clip",),
    "micro_batch_size": ("training.micro_batch_size", "training.batch_size"),
    "activation_checkpointing": ("training.activation_checkpointing",),
    "eval_every": ("training.eval.every_steps",),
}


def adapt_state(
    state: State,
    parts: Parts,
    before: Config,
    changes: Sequence[ConfigChange],
    reset: Collection[str],
    *,
    other_scores: bool,
) -> None:
    """Adapt ``state``, read from a checkpoint, to a run of these ``parts``."""
    values: dict[str, Any] = state
    settings, progress = values["settings"], values["progress"]
    _adapt_modules(values, parts.models)
    _adapt_schedule(values, before, changes, reset)
    if decided(changes, "length"):
        progress["is_over"] = False
    if "optimizer" in reset:
        values["optimizer"] = {}
    if "data" in reset:
        values["data"] = parts.loader.state_dict()
    if touches(changes, "training.optimizer.weight_decay", "training.optimizer"):
        settings["weight_decay"] = None
    if touches(changes, "training.optimizer.lr", "training.optimizer"):
        settings["lr_scale"] = 1.0  # it was found for the former rate
    for name, keys in _SETTINGS.items():
        if touches(changes, *keys):
            settings[name] = getattr(parts.settings, name)
    _adapt_routing(values["model"], parts.model, changes)
    if other_scores or decided(changes, "scores"):
        progress["best"] = None  # not comparable with later scores


def _adapt_modules(values: dict[str, Any], models: ModelSet) -> None:
    """Remove modules that are no longer trained beside the model; CheckpointError if one that is
    now trained is missing."""
    found: dict[str, dict[str, Tensor]] = values.pop(MODULES, {})
    for name, module in models.beside.items():
        wanted = {key: tuple(value.shape) for key, value in module.state_dict().items()}
        there = {key: tuple(value.shape) for key, value in found.get(name, {}).items()}
        if wanted != there:
            lacks = f"has another {name!r}" if name in found else f"has no {name!r}"
            raise CheckpointError(
                f"training.objective trains {name!r} beside the model, but the checkpoint {lacks}; "
                f"resume with the objective and options of the checkpoint, or start a new run "
                f"with its weights: training.init_from=RUN."
            )
    if models.beside:
        values[MODULES] = {name: found[name] for name in models.beside}
    gone = found.keys() - models.beside.keys()
    values["optimizer"] = {
        name: remembered
        for name, remembered in values["optimizer"].items()
        if name.partition("/")[0] not in gone
    }


def _adapt_routing(
    weights: dict[str, Any], model: Transformer, changes: Sequence[ConfigChange]
) -> None:
    """Set the live routing controls, and the capacity, whose configuration changed."""
    if model.depth is not None and touches(changes, "model.mod.capacity", "model.mod.schedule"):
        for name, value in model.depth.named_buffers():
            weights[f"depth.{name}"] = value.clone()
    if model.routing is None:
        return
    for name, value in model.routing.named_buffers():
        if touches(changes, f"model.moe.routing.{name}", f"model.moe.balance.{name}"):
            weights[f"routing.{name}"] = value.clone()


def _adapt_schedule(
    values: dict[str, Any],
    before: Config,
    changes: Sequence[ConfigChange],
    reset: Collection[str],
) -> None:
    """Start another schedule or length at the current rate of the old one, never above it."""
    settings, step = values["settings"], values["progress"]["step"]
    budget = Budget(**values["budget"])
    other_length = decided(changes, "length", "steps", "samples")
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
    "tokenizer_hash": ("the tokenizer", "restore the run's tokenizer folder"),
    "tokenizer_behavior": (
        "the code that tokenizes",
        "use the version of ultrathink that started the run (manifest.json)",
    ),
    "frozen_hash": (
        "the frozen model of training.objective",
        "name the original checkpoint: training.objective.teacher=RUN@STEP",
    ),
    "data_hash": ("the data", "restore the files"),
    "order_hash": (
        "the code that orders and packs samples",
        "use the version of ultrathink that started the run (manifest.json), or restart the data "
        "with --reset data",
    ),
}


def check_identity(recorded: dict[str, Any], here: dict[str, Any], reset: Collection[str]) -> None:
    """Refuse to resume with other data or another tokenizer than the checkpoint's."""
    for name, (what, advice) in _IDENTITIES.items():
        if name in ("data_hash", "order_hash") and "data" in reset:
            continue
        if recorded.get(name) != here.get(name):
            raise CheckpointError(
                f"{what} changed since the checkpoint was written (hash "
                f"{str(recorded.get(name))[:12]} then, {str(here.get(name))[:12]} now), so the run "
                f"cannot be resumed; {advice}, or start a new run with its weights: "
                f"training.init_from=RUN."
            )
