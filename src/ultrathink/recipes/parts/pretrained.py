"""Adapts a configuration to pretrained weights: their shape and their tokenizer.

The checkpoint decides the shape of the model; values set by the user (in the file or as an
override, not in a preset) must agree with it. RoPE scaling is free, because it is how a model
learns longer texts; so is the routing of experts, but options that could not be exported again are
off by default.
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
_OWN = ("file ", _OVERRIDE)  # prefixes of the origins of the user's values
# Defaults of new models that pretrained weights do without, unless the user sets them: a warm-up
# or a bias would send tokens to other experts than those trained on them.
_BEGUN = ("routing.warmup_steps", "balance.bias_rate")


def adopt_pretrained(config: Config, *, with_weights: bool = True) -> tuple[Config, Pretrained]:
    """``config`` adapted to its ``training.init_from=hf:…``, and that checkpoint.

    Raises ConfigError if the user's values describe another model, and CheckpointError if the
    checkpoint cannot be used. Without ``with_weights`` a download skips the weights.
    """
    source = config.training.init_from
    assert source is not None, "there is a checkpoint to start from"
    pretrained = open_pretrained(source, with_weights=with_weights)
    pretrained.check_length(config.data.seq_len)
    theirs = pretrained.model.model_dump(mode="json")
    chosen = {name for name in SHAPE if _is_stretched(config, name)}
    _refuse_another_model(config, theirs, chosen, source)
    values: dict[str, Any] = {f"model.{name}": theirs[name] for name in SHAPE if name not in chosen}
    values.update(_experts(config, theirs["moe"]))
    if "rope_scaling" in chosen and "max_positions" not in chosen:
        values["model.max_positions"] = None  # it follows from the scaling
    tokenizer = {"type": "hf", "vocab_size": pretrained.tokenizer.vocab_size}
    changed = config.replace({**values, "tokenizer": tokenizer}, origin=_origin(source))
    inside = ("tokenizer", *(f"{key}." for key in values))  # replaced as a whole
    origins = {key: text for key, text in changed.origins.items() if not key.startswith(inside)}
    origins.update({f"tokenizer.{key}": _origin(source) for key in tokenizer})
    return changed.with_origins(origins), pretrained


def shown_with_pretrained(config: Config) -> Config:
    """``config`` as training would use it, if it starts from weights of Hugging Face."""
    source = config.training.init_from
    if source is None or not is_pretrained(source):
        return config
    if config.origin("tokenizer.type") == _origin(source):  # that of a run, adapted already
        return config
    return adopt_pretrained(config, with_weights=False)[0]


def _origin(source: str) -> str:
    return f"from the weights {source}"


def _is_stretched(config: Config, name: str) -> bool:
    """Whether the user changes a value of the context length.

    The base of the frequencies counts only on the command line: in a file it may be the default,
    written out.
    """
    origin = _own_origin(config, f"model.{name}")
    if origin is None or getattr(config.model, name) is None:
        return False
    if name == "rope_theta":
        return origin.startswith(_OVERRIDE)
    return name in ("rope_scaling", "max_positions")


def _own_origin(config: Config, key: str) -> str | None:
    """The origin of the user's value of ``key``, or of a key in it."""
    for known, origin in config.origins.items():
        is_inside = f"{known}.".startswith(f"{key}.") or f"{key}.".startswith(f"{known}.")
        if is_inside and origin.startswith(_OWN):
            return origin
    return None


def _experts(config: Config, theirs: dict[str, Any] | None) -> dict[str, Any]:
    """The values of ``model.moe`` that a checkpoint fixes, by dotted key."""
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
            f"training.init_from={source} is another model than the configuration describes: "
            f"{'; '.join(found)}. Remove these keys, and the checkpoint decides them "
            f"(ultrathink config show CONFIG training.init_from={source} shows how)."
        )


def _other_experts(
    config: Config, ours: dict[str, Any] | None, theirs: dict[str, Any] | None
) -> list[str]:
    """The user's values for experts that differ from the checkpoint's."""
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
    """A value of ``model.moe`` as text; of groups only what must agree."""
    if name != "groups":
        return value
    return ", ".join(f"{group['num_experts']} top-{group['top_k']}" for group in value)
