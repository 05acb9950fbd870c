import itertools
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ultrathink.config.optimizer import CosineConfig, ScheduleConfig, WsdConfig
from ultrathink.training.budget import Budget
from ultrathink.training.schedules import build_schedule, ceiling_at, continued_schedule
from ultrathink.training.settings import LiveSettings

BUDGET = Budget(total_steps=100, tokens_per_step=1000, seconds_per_step=0.5)


def test_cosine_rises_then_follows_half_a_cosine() -> None:
    factor = build_schedule(CosineConfig(warmup=10, min_ratio=0.1), BUDGET)
    assert [factor(step) for step in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])
    expected = [0.1 + 0.9 * (1 + math.cos(math.pi * (s - 11) / 90)) / 2 for s in range(11, 101)]
    assert [factor(step) for step in range(11, 101)] == pytest.approx(expected)
    assert factor(101) == factor(10_000) == pytest.approx(0.1)


def test_wsd_is_flat_until_its_decay() -> None:
    factor = build_schedule(WsdConfig(warmup=10, decay=0.4, min_ratio=0.0), BUDGET)
    assert {factor(step) for step in range(10, 62)} == {1.0}
    assert factor(81) == pytest.approx(0.5)
    assert 0 < factor(100) < 0.03  # the last step still learns
    assert factor(101) == 0.0
    factor = build_schedule(WsdConfig(warmup=0, decay=1.0, shape="sqrt"), BUDGET)
    assert factor(26) == pytest.approx(1 - math.sqrt(0.25))


@pytest.mark.parametrize(
    ("warmup", "steps"), [(20, 20), (0.2, 20), ("20%", 20), ("20k tokens", 20), ("0.1 minutes", 12)]
)
def test_warmup_takes_steps_a_share_tokens_or_minutes(warmup: object, steps: int) -> None:
    factor = build_schedule(CosineConfig(warmup=warmup), BUDGET)
    assert factor(steps) == 1.0
    assert factor(steps - 1) == pytest.approx((steps - 1) / steps)


@given(
    total=st.integers(1, 500),
    warmup=st.integers(0, 600),
    decay=st.floats(0, 1),
    min_ratio=st.floats(0, 1),
    kind=st.sampled_from(["cosine", "linear", "sqrt"]),
)
def test_factor_stays_in_bounds_and_never_rises_after_warmup(
    total: int, warmup: int, decay: float, min_ratio: float, kind: str
) -> None:
    config: CosineConfig | WsdConfig
    if kind == "cosine":
        config = CosineConfig(warmup=warmup, min_ratio=min_ratio)
    else:
        config = WsdConfig(warmup=warmup, min_ratio=min_ratio, decay=decay, shape=kind)
    factor = build_schedule(config, Budget(total, 1000))
    values = [factor(step) for step in range(1, total + 20)]
    assert all(0 <= value <= 1 for value in values)
    peak = min(warmup, total)
    after = values[max(0, peak - 1) :]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(after))


# -- continuing with another schedule or length ---------------------------------------------------

SCHEDULES = st.one_of(
    st.builds(CosineConfig, warmup=st.integers(0, 60), min_ratio=st.floats(0, 1)),
    st.builds(
        WsdConfig,
        warmup=st.integers(0, 60),
        decay=st.floats(0, 1),
        min_ratio=st.floats(0, 1),
        shape=st.sampled_from(["linear", "sqrt"]),
    ),
)


@given(
    starts=st.lists(
        st.tuples(SCHEDULES, st.integers(1, 60), st.integers(1, 200)), min_size=2, max_size=5
    )
)
# The second start falls, but into a warm-up: it may go on to rise.
@example(
    starts=[
        (CosineConfig(warmup=0, min_ratio=0.0), 1, 1),
        (CosineConfig(warmup=3, min_ratio=0.0), 1, 2),
        (CosineConfig(warmup=0, min_ratio=0.0), 1, 4),
    ]
)
def test_no_resume_raises_the_rate_once_it_began_to_fall(
    starts: list[tuple[ScheduleConfig, int, int]],
) -> None:
    """Each start has a schedule, trains some steps, and has a length of its own."""
    settings, step, factors = LiveSettings(), 0, [0.0]
    is_warming_up = True
    for config, num_steps, left in starts:
        budget = Budget(step + max(num_steps, left), 1000)
        schedule = continued_schedule(config, budget, settings)
        before = factors[-1]
        is_falling = len(factors) > 2 and factors[-1] < factors[-2] and not is_warming_up
        for _ in range(num_steps):
            step += 1
            factors.append(schedule(step))
        if is_falling:
            assert max(factors[-num_steps:]) <= before
        is_warming_up = schedule(step + 1) > schedule(step)
        settings.schedule_ceiling = ceiling_at(schedule, step, settings.schedule_ceiling)


def test_a_run_stopped_while_it_warms_up_still_reaches_its_peak() -> None:
    settings = LiveSettings()
    config = CosineConfig(warmup=10)
    schedule = continued_schedule(config, Budget(50, 1000), settings)
    settings.schedule_ceiling = ceiling_at(schedule, 4, 1.0)
    longer = continued_schedule(config, Budget(100, 1000), settings)
    assert longer(5) == pytest.approx(0.5)
    assert longer(10) == 1.0


def test_a_schedule_that_restarts_counts_from_there() -> None:
    settings = LiveSettings(schedule_start=40)
    again = continued_schedule(CosineConfig(warmup=10), Budget(100, 1000), settings)
    alone = build_schedule(CosineConfig(warmup=10), Budget(60, 1000))
    assert [again(step) for step in range(41, 101)] == [alone(step) for step in range(1, 61)]
