"""Reads and writes rotary positions (RoPE) in a Hugging Face ``config.json``.

Two layouts are read: ``rope_theta`` with ``rope_scaling`` (written by transformers before 5, read
by all), and ``rope_parameters`` (written by transformers 5). The older one is written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from ultrathink.config.model import RopeScalingConfig
from ultrathink.core.errors import CheckpointError
from ultrathink.interop.values import Values

_KNOWN = ("default", "linear", "llama3", "yarn")
_LLAMA3 = ("low_freq_factor", "high_freq_factor")
_YARN = ("beta_fast", "beta_slow", "attention_factor")


def read_rope(
    config: Values, max_positions: int, default_theta: float
) -> tuple[float, RopeScalingConfig | None]:
    """The base of the frequencies and their scaling; CheckpointError for unsupported scaling.

    ``max_positions`` is the context length, in tokens, of ``config`` or its family, and
    ``default_theta`` the base if ``config`` has none.
    """
    # If a file has both layouts, transformers follows the older one.
    section = next((n for n in ("rope_scaling", "rope_parameters") if config.get(n)), None)
    values = config.get(section, {}) if section else {}
    if not isinstance(values, Mapping):
        raise config.unfit(str(section), "must be an object")
    rope = Values(values, config.path, f"{section}.")
    layered = [name for name, value in values.items() if isinstance(value, Mapping)]
    if layered:
        raise rope.unfit(layered[0], "other rotary positions in some layers are not supported")
    for source in (rope, config):
        if source.number("partial_rotary_factor", 1.0) != 1.0:
            raise source.unfit(
                "partial_rotary_factor", "only whole heads can be rotated here, which is 1.0"
            )
    theta = float(rope.number("rope_theta", config.number("rope_theta", default_theta)))
    kind = rope.get("rope_type") or rope.get("type", "default")
    if kind == "default":
        return theta, None
    if kind not in _KNOWN:
        name = "rope_type" if rope.get("rope_type") else "type"
        raise rope.unfit(name, _advice(kind, str(section), max_positions))
    try:
        return theta, RopeScalingConfig.model_validate(_scaling(kind, rope, config, max_positions))
    except ValidationError as error:
        problem = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise CheckpointError(f"{config.path}: {section}: {problem}.") from None


def _advice(kind: Any, section: str, max_positions: int) -> str:
    known = f"supported are {', '.join(_KNOWN)}"
    if kind == "dynamic":
        return (
            f"its scaling depends on the length of each text; {known}. Up to {max_positions} "
            f"tokens it changes nothing: for texts up to that length, set {section} to null"
        )
    return known


def _scaling(kind: str, rope: Values, config: Values, max_positions: int) -> dict[str, Any]:
    if kind == "linear":
        return {"type": kind, "factor": rope.number("factor")}
    name = "original_max_position_embeddings"
    source = config if config.get(name) is not None else rope  # outside, it goes before inside
    original = source.count(name, max_positions)
    scaling: dict[str, Any] = {"type": kind, "original_max_positions": original}
    if kind == "llama3":
        return scaling | {name: rope.number(name) for name in ("factor", *_LLAMA3)}
    if not rope.get("truncate", True):
        raise rope.unfit("truncate", "only true is supported for yarn")
    scaling["factor"] = rope.number("factor", max_positions / original)
    # Zero means the default, as in transformers.
    scaling["beta_fast"] = rope.number("beta_fast", 32.0) or 32.0
    scaling["beta_slow"] = rope.number("beta_slow", 1.0) or 1.0
    scaling["attention_factor"] = _attention_factor(rope, scaling["factor"])
    return scaling


def _attention_factor(rope: Values, factor: float) -> float | None:
    """The factor of cos and sin; None if it follows from ``factor``."""
    if rope.get("attention_factor") is not None:
        return rope.number("attention_factor")
    above, below = rope.number("mscale", 0.0), rope.number("mscale_all_dim", 0.0)
    if not above or not below:
        return None

    def scale(strength: float) -> float:
        return 0.1 * strength * math.log(factor) + 1.0 if factor > 1 else 1.0

    return scale(above) / scale(below)


def write_rope(theta: float, scaling: RopeScalingConfig | None) -> dict[str, Any]:
    """The keys of a ``config.json`` for these positions."""
    return {"rope_theta": theta, "rope_scaling": _write_scaling(scaling) if scaling else None}


def _write_scaling(scaling: RopeScalingConfig) -> dict[str, Any]:
    names = {"linear": (), "llama3": _LLAMA3, "yarn": _YARN}[scaling.type]
    values: dict[str, Any] = {"rope_type": scaling.type, "factor": scaling.factor}
    if scaling.type != "linear":
        values["original_max_position_embeddings"] = scaling.original_max_positions
    given = {name: getattr(scaling, name) for name in names}
    return values | {name: value for name, value in given.items() if value is not None}
