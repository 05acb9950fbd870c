"""What the outlier filter skips, and that it learns nothing from what it skipped."""

import math

import numpy as np
import pytest

from ultrathink.orchestrator.steering.outliers import ENOUGH, PATIENCE, OutlierFilter


def healthy(count: int, seed: int = 0) -> list[tuple[float, float]]:
    """Losses that fall from 5 to 2 with noise of a tenth, and norms that vary by a third."""
    draw = np.random.default_rng(seed)
    levels = 2 + 3 * np.exp(-np.arange(count) / 100)
    losses = levels * np.exp(0.1 * draw.standard_normal(count))
    norms = np.exp(0.3 * draw.standard_normal(count))
    return list(zip(losses.tolist(), norms.tolist(), strict=True))


def accustomed(count: int = 200) -> OutlierFilter:
    outliers = OutlierFilter()
    for loss, norm in healthy(count):
        assert not outliers.skips(loss, norm)
    return outliers


@pytest.mark.parametrize("seed", range(3))
def test_nothing_healthy_is_left_out(seed: int) -> None:
    outliers = OutlierFilter()
    assert not any(outliers.skips(loss, norm) for loss, norm in healthy(5000, seed))


@pytest.mark.parametrize(
    ("loss", "norm", "is_out"),
    [
        (9.0, 1.0, True),
        (2.0, 300.0, True),
        (2.4, 1.0, False),  # two deviations
        (2.0, 5.0, False),
        (1e-9, 1.0, True),  # nothing is learned so well at once
        (1.4, 1.0, False),  # low, and may be
        (2.0, 1e-9, False),
    ],
)
def test_what_is_left_out(loss: float, norm: float, is_out: bool) -> None:
    outliers = accustomed()
    assert outliers.skips(loss, norm) is is_out
    assert outliers.streak == int(is_out)
    assert outliers.last is not None
    assert outliers.last.values()["loss"] == loss


def test_the_first_steps_are_not_judged() -> None:
    outliers = accustomed(ENOUGH // 2)
    assert not outliers.skips(50.0, 1e4)


def test_what_was_left_out_does_not_become_usual() -> None:
    """Also half of the steps for a while."""
    outliers = accustomed(300)
    level = outliers.last.loss_level if outliers.last is not None else math.nan
    left_out = [outliers.skips(9.0 if n % 2 else 2.0, 1.0) for n in range(60)]
    assert left_out == [bool(n % 2) for n in range(60)]
    assert outliers.last is not None
    assert outliers.last.loss_level == pytest.approx(level, rel=0.1)


def test_a_new_level_is_accepted_in_the_end() -> None:
    outliers = accustomed(300)
    left_out = [outliers.skips(9.0, 1.0) for _ in range(PATIENCE + 50)]
    assert left_out == [True] * PATIENCE + [False] * 50
    assert outliers.streak == 0


def test_no_more_than_its_share_is_left_out() -> None:
    outliers = OutlierFilter(most=0.1)
    for loss, norm in healthy(300):
        outliers.skips(loss, norm)
    left_out = [outliers.skips(9.0 if n % 2 else 2.0, 1.0) for n in range(100)]
    assert sum(left_out) == math.ceil(0.1 * 256)


def test_negative_losses_do_not_stop_it() -> None:
    outliers = OutlierFilter()
    assert not any(outliers.skips(-1.0, 1.0) for _ in range(200))
