"""The load of a group of experts as a picture (``DESCRIPTION``), on a logarithmic scale.

The steps of colour are even in lightness (Oklab), so that darker means further from even in print
and for colour-blind readers too.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from ultrathink.monitoring.experts import Floats

    Pixels = npt.NDArray[np.uint8]

DESCRIPTION = (
    "Load of each expert relative to an even share. Rows: layers, the first on top. Columns: "
    "experts. White: 1. Blue: less, the darkest a quarter or below. Red: more, the darkest four "
    "times or above. Black: no token. Grey: an empty slot."
)
# From white on, in equal steps of lightness.
_BLUES = ("ffffff", "c6dcfe", "8ab9ff", "4c94fd", "1a6fe1", "0050af")
_REDS = ("ffffff", "ffcec3", "fe9783", "ec654d", "cc371e", "9e1800")
_SPAN = 2.0  # of log2(load / even load), to either side
_EVEN = 100  # colours from the darkest blue to white, and from white to the darkest red
_DEAD, _EMPTY = 2 * _EVEN + 1, 2 * _EVEN + 2
_WIDTH, _MIN_CELL, _MAX_CELL = 512, 4, 24  # pixels


class Picture(NamedTuple):
    """A PNG file, and its size in pixels."""

    png: bytes
    width: int
    height: int


def load_map(load: Floats, active: npt.NDArray[np.bool_]) -> Picture:
    """The picture of the ``load`` ``[L, N]`` of one group; ``active`` is false for empty slots."""
    cell = int(np.clip(_WIDTH // load.shape[1], _MIN_CELL, _MAX_CELL))
    return _picture(_colours(load, active).repeat(cell, 0).repeat(cell, 1))


def course_map(load: Floats, active: npt.NDArray[np.bool_]) -> Picture:
    """The picture of a group over time, a pixel a cell: ``load`` ``[S, N]`` gives S columns."""
    return _picture(np.ascontiguousarray(_colours(load, active).T))


def _colours(load: Floats, active: npt.NDArray[np.bool_]) -> Pixels:
    total = (load * active).sum(1, keepdims=True)
    even = total / active.sum(1, keepdims=True).clip(1)
    ratio = load / np.where(even > 0, even, 1.0)
    distance = np.log2(ratio, out=np.zeros_like(ratio), where=ratio > 0)
    colours = np.rint(_EVEN * (1 + np.clip(distance / _SPAN, -1, 1)))
    colours[load == 0] = _DEAD
    colours[~active] = _EMPTY
    return colours.astype(np.uint8)


def _palette() -> Pixels:
    """``[colours, 3]``: red, green, blue."""
    stops = [bytes.fromhex(text) for text in (*_BLUES[::-1], *_REDS[1:])]
    known = np.linspace(0, 2 * _EVEN, len(stops))
    places = np.arange(2 * _EVEN + 1)
    channels = [np.interp(places, known, [stop[c] for stop in stops]) for c in range(3)]
    special = np.array([[0, 0, 0], [128, 128, 128]])  # dead, empty
    return np.concatenate([np.rint(np.stack(channels, 1)), special]).astype(np.uint8)


def _picture(pixels: Pixels) -> Picture:
    from PIL import Image  # slow to import, and not needed by every run

    image = Image.fromarray(pixels)
    image.putpalette(_palette().tobytes())
    file = io.BytesIO()
    image.save(file, "PNG")
    return Picture(file.getvalue(), image.width, image.height)
