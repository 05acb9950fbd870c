"""Which part of a model one forward pass may use."""

from __future__ import annotations

from dataclasses import dataclass

from ultrathink.core.errors import ConfigError


@dataclass(frozen=True)
class ComputePath:
    """The layers of a forward pass, by index (``3``) or by fraction of the depth (``0.5``).

    A fraction names the layer that begins there: 0.0 the first, 0.5 of 8 layers index 4, 1.0 the
    last. ``None`` is every layer. Layers always run in order, each once.
    """

    layers: tuple[int | float, ...] | None = None

    def indices(self, num_layers: int) -> tuple[int, ...]:
        """The chosen layers of a model with ``num_layers``, ascending.

        Raises ConfigError, naming the value, for a layer the model does not have.
        """
        if self.layers is None:
            return tuple(range(num_layers))
        if not self.layers:
            raise ConfigError("ComputePath.layers is empty; name a layer, or None for all of them.")
        return tuple(sorted({_index(layer, num_layers) for layer in self.layers}))


def _index(layer: int | float, num_layers: int) -> int:
    if isinstance(layer, bool) or not isinstance(layer, int | float):
        raise ConfigError(
            f"ComputePath.layers: {layer!r} is no layer; write an index (3) or a fraction (0.5)."
        )
    if isinstance(layer, float):
        if not 0.0 <= layer <= 1.0:
            raise ConfigError(
                f"ComputePath.layers: the fraction {layer} is outside 0.0 to 1.0; an index is "
                f"written without a point."
            )
        return min(int(layer * num_layers), num_layers - 1)
    if not 0 <= layer < num_layers:
        raise ConfigError(
            f"ComputePath.layers: there is no layer {layer}; the model has {num_layers}, "
            f"0 to {num_layers - 1}."
        )
    return layer
