"""A configuration that begins with weights of others takes on their shape and their tokenizer.

The checkpoint decides the shape of the model; what the configuration itself sets (in its file or
as an override, not in a preset) has to agree with it. How positions are stretched is free, since
that is how a model is taught longer texts; so is how tokens are spread over experts, but what a
checkpoint could not be written back with begins switched off.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ultrathink.config.schema import Config
from ultrathink.core.errors import ConfigError
from ultrathink.interop.families import EXPERTS_SHAPE, SHAPE
from ultrathink.interop.fetching import is_pretrained
from ultrathink.interop.importing import Pretrained, open_pretrained

_OVERRIDE = "override "
_OWN = ("file ", _OVERRIDE)  # how the origins of values begin that the user gave
# Training from nothing begins with these, trained weights go on without, unless the user asks: a
# warm-up would send tokens to other experts than they are used to, and so would a bias.
_BEGUN = ("routing.warmup_steps", "balance.bias_rate")


def adopt_pretrained(config: Config, *, with_weights: bool = True) -> tuple[Config, Pretrained]:
    """``config`` with the model and the tokenizer of its ``training.init_from=hf:…``, and those.

    Raises ConfigError where its own values ask for another model, and CheckpointError where the
    checkpoint cannot be used. Without ``with_weights`` a download leaves the weights out.
    """
    source = config.training.init_from
    assert source is not None, "there is a checkpoint to begin from"
    pretrained = open_pretrained(source, with_weights=with_weights)
    pretrained.check_length(config.data.seq_len)
    theirs = pretrained.model.model_dump(mode="json")
    chosen = {name for name in SHAPE if _is_stretched(config, name)}
    _refuse_another_model(config, theirs, chosen, source)
    values: dict[str, Any] = {f"model.{name}": theirs[name] for name in SHAPE if name not in chosen}
    values.update(_experts(config, theirs["moe"]))
    if "rope_scaling" in chosen and "max_positions" not in chosen:
        values["model.max_positions"] = None  # what it comes to follows from the stretching
    tokenizer = {"type": "hf", "vocab_size": pretrained.tokenizer.vocab_size}
    changed = config.replace({**values, "tokenizer": tokenizer}, origin=_origin(source))
    inside = ("tokenizer", *(f"{key}." for key in values))  # replaced as a whole
    origins = {key: text for key, text in changed.origins.items() if not key.startswith(inside)}
    origins.update({f"tokenizer.{key}": _origin(source) for key in tokenizer})
    return changed.with_origins(origins), pretrained


def shown_with_pretrained(config: Config) -> Config:
    """``config`` as training would use it, where it begins with weights of Hugging Face."""
    source = config.training.init_from
    if source is None or not is_pretrained(source):
        return config
    if config.origin("tokenizer.type") == _origin(source):  # a run's, which has taken it on
        return config
    return adopt_pretrained(config, with_weights=False)[0]


def _origin(source: str) -> str:
    return f"from the weights {source}"


def _is_stretched(config: Config, name: str) -> bool:
    """Whether the user wants another value of the context's than the checkpoint's.

    The base of the frequencies is asked for on the command line only: in a file it may be the
    default that somebody wrote out.
    """
    origin = _own_origin(config, f"model.{name}")
    if origin is None or getattr(config.model, name) is None:
        return False
    if name == "rope_theta":
        return origin.startswith(_OVERRIDE)
    return name in ("rope_scaling", "max_positions")


def _own_origin(config: Config, key: str) -> str | None:
    """Where the user's own value of ``key``, or of something in it, came from."""
    for known, origin in config.origins.items():
        is_inside = f"{known}.".startswith(f"{key}.") or f"{key}.".startswith(f"{known}.")
        if is_inside and origin.startswith(_OWN):
            return origin
    return None


def _experts(config: Config, theirs: dict[str, Any] | None) -> dict[str, Any]:
    """What a checkpoint decides of ``model.moe``, by dotted key."""
    ours = config.model.moe
    if theirs is None or ours is None:
        return {"model.moe": theirs}
    values = {f"model.moe.{name}": theirs[name] for name in EXPERTS_SHAPE}
    if _own_origin(config, "model.moe.groups"):  # their numbers agree; the names are the user's
        del values["model.moe.groups"]
    for key in _BEGUN:
        section, name = key.split(".")
        if not _own_origin(config, f"model.moe.{key}"):
            values[f"model.moe.{key}"] = theirs[section][name]
    return values


def _refuse_another_model(
    config: Config, theirs: dict[str, Any], chosen: Collection[str], source: str
) -> None:
    ours = config.model.model_dump(mode="json")
    found = [
        f"model.{name} is {ours[name]} ({origin}), the checkpoint's {theirs[name]}"
        for name in SHAPE
        if name not in chosen
        and ours[name] != theirs[name]
        and (origin := _own_origin(config, f"model.{name}"))
    ]
    found.extend(_other_experts(config, ours["moe"], theirs["moe"]))
    origin = _own_origin(config, "tokenizer")
    if origin is not None and config.tokenizer.type != "hf":
        found.append(f"tokenizer is {config.tokenizer.type} ({origin}), the checkpoint has its own")
    if found:
        raise ConfigError(
            f"training.init_from={source} holds another model than the configuration asks for: "
            f"{'; '.join(found)}. Leave these keys out, and the checkpoint decides them "
            f"(ultrathink config show CONFIG training.init_from={source} shows how)."
        )


def _other_experts(
    config: Config, ours: dict[str, Any] | None, theirs: dict[str, Any] | None
) -> list[str]:
    """What the user says of experts, and the checkpoint says otherwise."""
    origin = _own_origin(config, "model.moe")
    if origin is None or ours is theirs is None:
        return []
    if ours is None or theirs is None:
        is_set, has = ("null", "has") if ours is None else ("set", "has no")
        return [f"model.moe is {is_set} ({origin}), the checkpoint {has} experts"]
    found = []
    for name in EXPERTS_SHAPE:
        own = _own_origin(config, f"model.moe.{name}")
        here, there = (_shown(name, moe[name]) for moe in (ours, theirs))
        if own is not None and here != there:
            found.append(f"model.moe.{name} is {here} ({own}), the checkpoint's {there}")
    return found


def _shown(name: str, value: Any) -> Any:
    """A value of ``model.moe``; of groups, what has to agree: their names and room are free."""
    if name != "groups":
        return value
    return ", ".join(f"{group['num_experts']} top-{group['top_k']}" for group in value)
