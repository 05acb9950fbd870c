"""Layers by index or by fraction of the depth."""

from __future__ import annotations

from ultrathink.core.errors import ConfigError


def layer_index(layer: int | float, num_layers: int, where: str) -> int:
    """The index of ``layer`` among ``num_layers``.

    A fraction names the layer that starts there: 0.0 the first, 0.5 of 8 layers index 4, 1.0 the
    last. Raises ConfigError, starting with ``where``, for a layer that does not exist.
    """
    if isinstance(layer, bool) or not isinstance(layer, int | float):
        raise ConfigError(
            f"{where}: {layer!r} is not a layer; write an index (3) or a fraction (0.5)."
        )
    if isinstance(layer, float):
        if not 0.0 <= layer <= 1.0:
            raise ConfigError(
                f"{where}: the fraction {layer} is outside 0.0 to 1.0; an index is "
                f"written without a point."
            )
        return min(int(layer * num_layers), num_layers - 1)
    if not 0 <= layer < num_layers:
        raise ConfigError(
            f"{where}: there is no layer {layer}; the model has {num_layers}, "
            f"0 to {num_layers - 1}."
        )
    return layer
