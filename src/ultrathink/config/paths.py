"""Section ``model.paths``: parts of a model that can run alone, each at its own cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from pydantic import field_validator, model_validator

from ultrathink.config.base import Section, no_truth_values
from ultrathink.config.depth import eighths_of
from ultrathink.config.experts import MoeConfig
from ultrathink.config.options import fixed
from ultrathink.core.errors import ConfigError, suggestion
from ultrathink.core.layers import layer_index

TRAINED = "the run has trained these paths"


class PathConfig(Section):
    """A compute path: the layers, expert groups and experts that a forward pass uses."""

    name: str = fixed(because=TRAINED, pattern=r"^[a-z][a-z0-9_-]*$")
    """What the path is called, as in generate --path and loss/<name>."""
    layers: int | float | tuple[int | float, ...] = fixed(1.0, because=TRAINED)
    """The layers that run: the first so many (3), the first share of them (0.5), or a list of
    indices and fractions of the depth."""
    _layers = field_validator("layers", mode="before")(no_truth_values)
    groups: Literal["all"] | tuple[str, ...] = fixed("all", because=TRAINED)
    """The expert groups that run; without any, layers of experts run their shared expert alone."""
    top_k: float = fixed(1.0, because=TRAINED, gt=0)
    """Experts of a token, as a multiple of each group's top_k: at least 1, at most all."""
    depth: float | None = fixed(None, because=TRAINED, gt=0, le=1)
    """Share of the tokens that go through each layer with depth routing, rounded to eighths; that
    of training when unset."""

    @model_validator(mode="after")
    def _number_of_layers(self) -> PathConfig:
        layers = self.layers
        if isinstance(layers, float) and not 0 < layers <= 1:
            raise ValueError(f"layers ({layers}) as a share of the depth must be above 0, up to 1")
        if isinstance(layers, int) and layers < 1:
            raise ValueError(f"layers ({layers}) must be at least 1")
        if layers == ():
            raise ValueError("layers is empty; name at least one")
        return self

    def indices(self, num_layers: int) -> tuple[int, ...]:
        """The layers of a model with ``num_layers``; ConfigError for one that is not there."""
        where = f"layers of path {self.name!r}"
        if isinstance(self.layers, tuple):
            return tuple(sorted({layer_index(one, num_layers, where) for one in self.layers}))
        count = self.layers
        if isinstance(count, float):
            count = max(1, int(count * num_layers + 0.5))
        if count > num_layers:
            raise ConfigError(f"{where}: {count} are more than the model has, {num_layers}.")
        return tuple(range(count))


class ExitsConfig(Section):
    """Layers after which the model can end early."""

    layers: tuple[int | float, ...] = fixed((), because=TRAINED)
    """The layers, by index or fraction of the depth; where the named paths end that begin the whole
    model, when empty."""
    _layers = field_validator("layers", mode="before")(no_truth_values)
    own_norms: bool = fixed(False, because="the weights would no longer fit")
    """Give each exit a norm of its own before the shared head; else it uses the last one."""


def named_paths(configured: Iterable[PathConfig], moe: MoeConfig | None) -> dict[str, PathConfig]:
    """The ``configured`` paths, and five that are derived where those do not define them.

    ``fast`` is the first quarter of the layers without expert groups, ``standard`` five eighths,
    ``expert`` the same layers with the groups, ``deep`` the whole model as it is trained,
    ``ultra_deep`` twice as many experts for each token. Where layers of experts have no shared
    expert, groups are never left out.
    """
    groups: Literal["all"] | tuple[str, ...] = "all"
    if moe is not None and moe.shared_size is not None:
        groups = ()
    derived = (
        PathConfig(name="fast", layers=0.25, groups=groups),
        PathConfig(name="standard", layers=0.625, groups=groups),
        PathConfig(name="expert", layers=0.625),
        PathConfig(name="deep"),
        PathConfig(name="ultra_deep", top_k=2.0),
    )
    return {path.name: path for path in (*derived, *configured)}


def check_groups(moe: MoeConfig | None, groups: Iterable[str], where: str) -> tuple[str, ...]:
    """The names of all expert groups; ConfigError, starting with ``where``, if one of ``groups``
    does not exist."""
    names = () if moe is None else tuple(group.name for group in moe.groups)
    for name in groups:
        if name not in names:
            there = suggestion(name, names) if names else "The model has no expert groups."
            raise ConfigError(f"{where}: there is no expert group {name!r}. {there}")
    return names


def groups_that_run(
    moe: MoeConfig | None, routed: Sequence[int], groups: Sequence[str] | None, where: str
) -> tuple[str, ...]:
    """``groups`` (None: all) in the order of the configuration; ``routed`` are the layers of a path
    that have experts.

    Raises ConfigError, starting with ``where``, for a group that does not exist, and if a layer
    would have nothing to compute: neither a group nor a shared expert.
    """
    names = check_groups(moe, groups or (), where)
    if groups is None or moe is None:
        return names
    if not groups and routed and moe.shared_size is None:
        raise ConfigError(
            f"{where}: without expert groups layer {routed[0]} would compute nothing, because it "
            f"has no shared expert; name a group, or set model.moe.shared_size."
        )
    return tuple(name for name in names if name in groups)


def check_depth(depth: float | None, has_routing: bool, where: str) -> int | None:
    """The capacity ``depth`` of depth routing in eighths, None for that of training.

    Raises ConfigError, starting with ``where``, for one outside (0, 1], and for any in a model
    without depth routing.
    """
    if depth is None:
        return None
    if not has_routing:
        raise ConfigError(f"{where}: the model has no depth routing; model.mod gives it some.")
    if not 0 < depth <= 1:
        raise ConfigError(f"{where}: {depth} must be a share above 0, up to 1.")
    return eighths_of(depth)
