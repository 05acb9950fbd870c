"""Curves drawn with characters."""

import math

from ultrathink.monitoring.plot import Point, Scale, bars, draw

FALLING: list[Point] = [(float(x), 10.0 - x) for x in range(11)]


def drawn(*curves: list[Point], width: int = 10, height: int = 4) -> list[str]:
    scale = Scale.of(curves)
    assert scale is not None
    rows = draw(curves, scale, end=10.0, width=width, height=height)
    assert len(rows) == height
    assert all(len(row) == width for row in rows)
    return ["".join(dots.character for dots in row) for row in rows]


def test_a_falling_line_goes_from_corner_to_corner() -> None:
    rows = drawn(FALLING)
    assert ord(rows[0][0]) & 0x01  # the upper left dot
    assert ord(rows[-1][-1]) & 0x80  # the lower right dot
    assert rows[-1][0] == rows[0][-1] == "\u2800"
    filled = [[n for n, c in enumerate(row) if c != "\u2800"] for row in rows]
    assert [number for row in filled for number in row] == sorted(
        number for row in filled for number in row
    )


def test_points_are_joined() -> None:
    rows = drawn([(0.0, 1.0), (10.0, 1.0)])
    assert all(character != "\u2800" for character in rows[-1])


def test_each_dot_belongs_to_its_curve() -> None:
    curves = [[(0.0, 2.0), (10.0, 2.0)], [(0.0, 1.0), (10.0, 1.0)]]
    scale = Scale.of(curves)
    assert scale is not None
    top, middle, bottom = draw(curves, scale, end=10.0, width=5, height=3)
    assert {dots.curve for dots in top} == {0}
    assert {dots.curve for dots in middle} == {None}
    assert {dots.curve for dots in bottom} == {1}


def test_what_is_not_finite_or_beyond_the_end_is_not_drawn() -> None:
    scale = Scale(1.0, 5.0)
    curve = [(0.0, 1.0), (5.0, math.nan), (10.0, 1.0), (20.0, 5.0), (-1.0, 5.0)]
    drawn_so = [draw([c], scale, end=10.0, width=5, height=3) for c in (curve, curve[::2][:2])]
    assert drawn_so[0] == drawn_so[1]
    assert Scale.of([[(0.0, math.nan)], []]) is None


def test_the_scale_is_logarithmic_above_zero_only() -> None:
    for low, high, middle in ((1.0, 100.0, 10.0), (0.0, 100.0, 50.0), (-1.0, 1.0, 0.0)):
        scale = Scale.of([[(0.0, low), (1.0, high)]])
        assert scale is not None
        assert scale.share(middle) == 0.5
    assert Scale(3.0, 3.0).share(3.0) == 0.0
    assert math.isnan(Scale(1.0, 2.0, is_log=True).share(0.0))


def test_bars_follow_the_curve() -> None:
    scale = Scale(0.0, 7.0)
    curve = [(x + 0.5, float(x)) for x in range(8)]
    assert bars(curve, scale, end=8.0, width=8) == "▁▂▃▄▅▆▇█"
    assert bars([(1.5, 0.0), (5.5, 7.0)], scale, end=8.0, width=8) == " ▁▁▁▁█"
    assert bars([], scale, end=8.0, width=8) == ""
    assert bars([(0.1, 0.0), (0.2, 7.0), (0.3, 7.0)], scale, end=8.0, width=8) == "▆"
