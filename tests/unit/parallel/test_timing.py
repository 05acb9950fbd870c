import time
from dataclasses import replace

import pytest

from ultrathink.parallel.timing import JUDGED_STEPS, CommunicationClock, StepTimes, Timing
from ultrathink.parallel.world import ALONE


def test_the_share_of_communication_is_that_of_all_time() -> None:
    timing = Timing(computing=(3.0, 1.0), communicating=(1.0, 3.0))
    assert timing.communication_share == 0.5
    assert timing.metrics()["compute_s_slowest"] == 3.0
    assert timing.stragglers() == {0: 3.0}


def test_a_straggler_is_named_when_it_begins_to_be_one() -> None:
    times = StepTimes(ALONE, CommunicationClock())
    slow = Timing((1.0, 2.5, 1.0, 1.1), (0.0,) * 4, num_steps=JUDGED_STEPS)
    even = Timing((1.0, 1.2, 1.0, 1.1), (0.0,) * 4, num_steps=JUDGED_STEPS)
    assert times.new_stragglers(even) == []
    assert times.new_stragglers(replace(slow, num_steps=1)) == []  # a few steps tell nothing
    assert times.new_stragglers(even) == []
    [sentence] = times.new_stragglers(slow)
    assert sentence.startswith("process 1 computes 2.5 times as long")
    assert times.new_stragglers(slow) == []
    assert times.new_stragglers(even) == []
    assert len(times.new_stragglers(slow)) == 1


def test_times_are_means_over_steps() -> None:
    clock = CommunicationClock()
    times = StepTimes(ALONE, clock)
    with clock.running():
        time.sleep(0.02)
    times.add(2.0)
    times.add(4.0)
    timing = times.compare()
    [communicating] = timing.communicating
    assert 0.01 <= communicating < 0.5
    assert timing == Timing((pytest.approx(3.0 - communicating),), (communicating,), num_steps=2)
    assert times.compare() == Timing((0.0,), (0.0,), num_steps=1)
