"""Steps that become slow because other processes use the cores are reported, once."""

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch

from ultrathink.training.pace import CoreUse, Pace, core_use


class Machine:
    """Two cores of which this process uses ``own`` and all processes ``busy`` per second."""

    def __init__(self, own: float, busy: float, num_cores: int = 2) -> None:
        self.own, self.busy, self.num_cores = own, busy, num_cores
        self.time_s, self.num_calls = 0.0, 0

    def measure(self) -> CoreUse:
        self.num_calls += 1
        times = self.time_s, self.own * self.time_s, self.busy * self.time_s
        return CoreUse(*times, self.num_cores)

    def train(self, pace: Pace, *seconds: float, log_every: int = 5) -> list[str]:
        """Take steps of these durations; returns the warnings."""
        said = []
        for step, taken in enumerate(seconds, 1):
            self.time_s += taken
            said += pace.of_step(taken, is_logged=step % log_every == 0)
        return said


FAST, SLOW = [0.1] * 50, [4.0] * 10


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_it_is_reported_once_with_the_factor_the_use_and_the_remedy() -> None:
    machine = Machine(own=0.9, busy=2.0)
    pace = Pace(measure=machine.measure)
    assert machine.train(pace, *FAST) == []
    assert machine.num_calls == 0  # it costs nothing while steps are fast
    assert machine.train(pace, *SLOW) == [
        "steps take 40 times as long as before (4 s instead of 0.1 s), and other processes use 1.1 "
        "of the 2 cores: stop them, or wait for them, or resume with OMP_NUM_THREADS=1"
    ]
    assert machine.train(pace, *SLOW, *FAST, *SLOW) == []


@pytest.mark.parametrize(
    ("own", "busy", "why"),
    [
        (2.0, 2.0, "the run itself uses all cores"),
        (0.1, 0.6, "there are free cores"),
        (1.7, 2.0, "others use little"),
    ],
)
def test_slow_steps_alone_are_not_reported(own: float, busy: float, why: str) -> None:
    machine = Machine(own, busy)
    assert machine.train(Pace(measure=machine.measure), *FAST, *SLOW * 3) == [], why


def test_processes_of_the_same_run_are_not_others() -> None:
    machine = Machine(own=0.95, busy=2.0)
    assert machine.train(Pace(2, machine.measure), *FAST, *SLOW) == []


@pytest.mark.parametrize(
    "seconds",
    [
        [30.0, *FAST],  # the first step compiles
        [*FAST, *[0.25] * 200],  # less than three times as slow
        [*FAST, *[0.1, 0.1, 0.1, 5.0, 5.0] * 20],  # single slow steps, as for a garbage collection
        [*FAST, *[4.0] * 5, *FAST],  # a short disturbance
    ],
)
def test_ordinary_runs_are_not_reported(seconds: list[float]) -> None:
    machine = Machine(own=0.9, busy=2.0)
    assert machine.train(Pace(measure=machine.measure), *seconds) == []


def test_a_system_that_does_not_report_its_cores_is_not_judged() -> None:
    pace, machine = Pace(measure=lambda: None), Machine(own=0.9, busy=2.0)
    assert machine.train(pace, *FAST, *SLOW) == []


def test_the_use_of_the_cores_includes_children() -> None:
    before = core_use()
    assert before is not None
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        deadline = time.monotonic() + 30
        while (now := core_use()) is not None and now.own_s - before.own_s < 0.3:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        child.kill()
        child.wait()
    assert now is not None
    assert now.all_s - before.all_s >= 0.25  # which ticks of 10 ms add up to
    assert now.num_cores >= 1
