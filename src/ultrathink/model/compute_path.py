"""The part of a model that a forward pass uses."""

from __future__ import annotations

from dataclasses import dataclass

from ultrathink.core.errors import ConfigError
from ultrathink.core.layers import layer_index


@dataclass(frozen=True)
class ComputePath:
    """The layers of a forward pass, by index (``3``) or by fraction of the depth (``0.5``).

    A fraction names the layer that starts there: 0.0 the first, 0.5 of 8 layers index 4, 1.0 the
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
        return tuple(
            sorted({layer_index(layer, num_layers, "ComputePath.layers") for layer in self.layers})
        )
