"""The picture of a group's load, as another program reads it."""

import io
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from ultrathink.monitoring.heat_map import load_map

Colour = tuple[int, int, int]
WHITE, BLACK, GREY = (255, 255, 255), (0, 0, 0), (128, 128, 128)


def cells(
    load: Sequence[Sequence[float]], empty: Sequence[tuple[int, int]] = ()
) -> list[list[Colour]]:
    """The colour in the middle of each cell."""
    values = np.array(load, dtype=float)
    active = np.ones(values.shape, dtype=bool)
    for place in empty:
        active[place] = False
    picture = load_map(values, active)
    with Image.open(io.BytesIO(picture.png)) as opened:
        opened.verify()  # every checksum
    with Image.open(io.BytesIO(picture.png)) as opened:
        image = opened.convert("RGB")
    assert image.size == (picture.width, picture.height)
    size = picture.width // values.shape[1]
    assert size * values.shape[0] == picture.height
    assert size >= 4
    pixels = np.asarray(image).reshape(values.shape[0], size, values.shape[1], size, 3)
    assert (pixels == pixels[:, :1, :, :1]).all()  # a cell has one colour
    return [[tuple(map(int, pixels[r, 0, c, 0])) for c in range(values.shape[1])]
            for r in range(values.shape[0])]  # type: ignore[misc]  # fmt: skip


def lightness(colour: Colour) -> float:
    """CIE L*, of 0 to 100."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4
              for v in (channel / 255 for channel in colour)]  # fmt: skip
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return 116 * luminance ** (1 / 3) - 16 if luminance > 0.008856 else 903.3 * luminance


def test_rows_are_layers_and_columns_experts() -> None:
    (top, bottom) = cells([[10, 10, 0, 20], [5, 5, 5, 5]])
    assert bottom == [WHITE] * 4
    assert top[:3] == [WHITE, WHITE, BLACK]
    red, green, blue = top[3]
    assert red > green > 0
    assert red > blue


def test_more_is_red_and_less_is_blue_and_both_darken_evenly() -> None:
    mean = 64.0
    ratios = [2.0 ** (step / 4) for step in range(9)]  # 1 to 4
    for colour_of, sign in ((0, 1), (2, -1)):
        loads = [mean * ratio**sign for ratio in ratios]
        # Two experts of every load that together keep the mean: only the first of them is judged.
        rows = [[load, *[(mean * 400 - load) / 399] * 399] for load in loads]
        colours = [row[0] for row in cells(rows)]
        light = np.array([lightness(colour) for colour in colours])
        steps = -np.diff(light)
        assert (steps > 0).all()
        assert steps.max() / steps.min() < 1.6
        for colour in colours[2:]:
            assert max(colour) == colour[colour_of]


@pytest.mark.parametrize("ratio", [8, 1000])
def test_beyond_the_scale_is_its_end(ratio: float) -> None:
    high = cells([[ratio, *[(1000 - ratio) / 999] * 999]])[0][0]
    low = cells([[1 / ratio, *[(1000 - 1 / ratio) / 999] * 999]])[0][0]
    assert high == (0x9E, 0x18, 0x00)
    assert low == (0x00, 0x50, 0xAF)


def test_even_loads_are_white_empty_slots_grey_and_a_layer_without_tokens_black() -> None:
    assert cells([[7, 7, 7], [300, 300, 300]]) == [[WHITE] * 3] * 2
    assert cells([[4, 4, 0, 0]], empty=[(0, 2), (0, 3)]) == [[WHITE, WHITE, GREY, GREY]]
    assert cells([[0, 0]]) == [[BLACK, BLACK]]
    assert cells([[0, 0]], empty=[(0, 0), (0, 1)]) == [[GREY, GREY]]
