"""The part of a model that a forward pass uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from ultrathink.config.depth import EIGHTHS
from ultrathink.config.model import ModelConfig
from ultrathink.config.paths import check_depth, check_groups, groups_that_run
from ultrathink.core.errors import ConfigError
from ultrathink.core.layers import layer_index


@dataclass(frozen=True)
class ComputePath:
    """The layers of a forward pass, and what of their experts runs.

    The default is the whole model, as it is trained.
    """

    layers: tuple[int | float, ...] | None = None
    """By index (``3``) or by fraction of the depth: 0.0 names the first layer, 0.5 of 8 layers
    index 4, 1.0 the last. None is every layer. Layers always run in order, each once."""

    groups: tuple[str, ...] | None = None
    """The expert groups that run; without any, the shared expert alone. None is every group."""

    top_k: float = 1.0
    """Experts of a token, as a multiple of each group's ``top_k``: at least 1, at most all."""

    depth: float | None = None
    """Share of the tokens that go through each layer with depth routing, in eighths; None is that
    of training."""

    group_factors: Mapping[str, float | Tensor] = field(default_factory=dict, compare=False)
    """Factors of the gates of some groups, for all rows or ``[B]`` for each. They may change from
    pass to pass; what a cache holds keeps those that it was computed with."""

    def resolved(self, config: ModelConfig) -> ComputePath:
        """The same path with the indices of layers and the names of groups in a model.

        Raises ConfigError, naming the value, for a layer or group that the model does not have,
        and if a layer would have nothing to compute.
        """
        layers = self.indices(config.num_layers)
        if not self.top_k > 0:
            raise ConfigError(f"ComputePath.top_k must be above 0, not {self.top_k}.")
        groups = groups_that_run(
            config.moe, config.routed(layers), self.groups, "ComputePath.groups"
        )
        check_groups(config.moe, self.group_factors, "ComputePath.group_factors")
        eighths = check_depth(self.depth, config.mod is not None, "ComputePath.depth")
        depth = None if eighths is None else eighths / EIGHTHS
        return replace(self, layers=layers, groups=groups, depth=depth)

    def indices(self, num_layers: int) -> tuple[int, ...]:
        """The chosen layers of a model with ``num_layers``, ascending.

        Raises ConfigError, naming the value, for a layer the model does not have.
        """
        if self.layers is None:
            return tuple(range(num_layers))
        if not self.layers:
            raise ConfigError("ComputePath.layers is empty; name a layer, or None for all of them.")
        return tuple(
            sorted({layer_index(layer, num_layers, "ComputePath.layers") for layer in self.layers})
        )

    def is_prefix_of(self, other: ComputePath, config: ModelConfig) -> bool:
        """Whether ``other`` begins with the layers of this path, and computes the same in them."""
        mine, theirs = self.resolved(config), other.resolved(config)
        layers = mine.indices(config.num_layers)
        if theirs.indices(config.num_layers)[: len(layers)] != layers:
            return False
        if set(layers) & set(config.depth_layers) and mine.depth != theirs.depth:
            return False
        return not config.routed(layers) or (mine.groups, mine.top_k) == (
            theirs.groups,
            theirs.top_k,
        )

    def describe(self, config: ModelConfig) -> str:
        """What of a model runs: ``layers [0, 1] (expert groups: skill; top_k: 1)``."""
        path = self.resolved(config)
        layers = path.indices(config.num_layers)
        details = []
        if config.routed(layers):
            details.append(f"expert groups: {', '.join(path.groups or ()) or 'none'}")
            details.append(f"top_k: {path.top_k:g}")
        if set(layers) & set(config.depth_layers) and path.depth is not None:
            details.append(f"depth: {path.depth:g}")
        beside = f" ({'; '.join(details)})" if details else ""
        return f"layers {list(layers)}{beside}"


def path_of(path: str | ComputePath | None, config: ModelConfig) -> ComputePath:
    """``path``, or the one called so, resolved for a model; None is the whole model.

    Raises ConfigError for a name, layer or group that does not exist.
    """
    if isinstance(path, str):
        found = config.path(path)
        groups = None if found.groups == "all" else found.groups
        path = ComputePath(found.indices(config.num_layers), groups, found.top_k, found.depth)
    return (path or ComputePath()).resolved(config)
