"""Steps that become slow because other processes use the cores are reported, once."""

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch

from ultrathink.training.pace import CoreUse, Pace, core_use


class Machine:
    """Two cores of which this process uses ``own`` and others ``others`` while steps are taken."""

    def __init__(self) -> None:
        self.time_s = self.own_s = self.all_s = 0.0
        self.num_calls = 0

    def measure(self) -> CoreUse:
        self.num_calls += 1
        return CoreUse(self.time_s, self.own_s, self.all_s, num_cores=2)

    def train(self, pace: Pace, *seconds: float, own: float, others: float = 0.0) -> list[str]:
        """Take steps of these durations, each fifth of them logged; returns the warnings."""
        said = []
        for step, taken in enumerate(seconds, 1):
            self.time_s += taken
            self.own_s += own * taken
            self.all_s += (own + others) * taken
            said += pace.of_step(taken, is_logged=step % 5 == 0)
        return said


FAST, SLOW = [0.1] * 150, [4.0] * 10


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_slower_steps_are_reported_once_with_the_factor_the_use_and_the_remedy() -> None:
    machine = Machine()
    pace = Pace(measure=machine.measure)
    assert machine.train(pace, *FAST, own=2.0) == []
    calls = machine.num_calls
    assert machine.train(pace, *FAST, own=2.0) == []
    assert machine.num_calls == calls  # it costs nothing while steps are fast
    assert machine.train(pace, *SLOW, own=0.9, others=1.1) == [
        "steps take 40 times as long as before (4 s instead of 0.1 s), and other processes use 1.1 "
        "of the 2 cores: stop them, or wait for them, or resume with OMP_NUM_THREADS=1"
    ]
    assert machine.train(pace, *SLOW, *FAST, *SLOW, own=0.9, others=1.1) == []


def test_a_run_that_competes_from_its_first_step_is_reported() -> None:
    machine = Machine()
    assert machine.train(Pace(measure=machine.measure), *FAST, own=0.9, others=1.1) == [
        "this run's threads wait for each other, and other processes use 1.1 of the 2 cores: stop "
        "them, or wait for them, or resume with OMP_NUM_THREADS=1"
    ]
    torch.set_num_threads(1)  # a core for each
    assert machine.train(Pace(measure=machine.measure), *FAST, own=1.0, others=1.0) == []


@pytest.mark.parametrize(
    ("own", "others", "why"),
    [
        (2.0, 0.0, "the run itself uses all cores"),
        (0.1, 0.5, "there are free cores"),
        (1.7, 0.3, "others use little"),
    ],
)
def test_slow_steps_alone_are_not_reported(own: float, others: float, why: str) -> None:
    machine = Machine()
    pace = Pace(measure=machine.measure)
    assert machine.train(pace, *FAST, *SLOW * 3, own=own, others=others) == [], why


def test_processes_of_the_same_run_are_not_others() -> None:
    machine = Machine()
    pace = Pace(2, machine.measure)
    assert machine.train(pace, *FAST, *SLOW, own=0.95, others=1.05) == []


@pytest.mark.parametrize(
    "seconds",
    [
        [0.25] * 200,  # less than three times as slow
        [0.1, 0.1, 0.1, 5.0, 5.0] * 20,  # single slow steps, as for a garbage collection
        [*[4.0] * 5, *FAST],  # a short disturbance
    ],
)
def test_ordinary_runs_are_not_reported(seconds: list[float]) -> None:
    machine = Machine()
    pace = Pace(measure=machine.measure)
    assert machine.train(pace, 30.0, *FAST[1:], own=2.0) == []  # the first step compiles
    assert machine.train(pace, *seconds, own=0.9, others=1.1) == []


def test_a_system_that_does_not_report_its_cores_is_not_judged() -> None:
    pace = Pace(measure=lambda: None)
    assert Machine().train(pace, *FAST, *SLOW, own=0.9, others=1.1) == []


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
