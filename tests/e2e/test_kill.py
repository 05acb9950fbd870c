"""What ends a run without asking it: SIGKILL at any moment, and a second Ctrl-C.

``python -m tests.stress.kill`` is the long form, with fifty kills.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.stress import evidence
from tests.stress.kill import OPTIONS, kill_and_compare, plan, summary
from tests.stress.process import Session

SEED = 6  # one of the kills it draws hits the trainer and leaves its loader worker behind


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_a_run_killed_again_and_again_is_the_undisturbed_one_bit_for_bit(tmp_path: Path) -> None:
    options = ["debug", *OPTIONS, "data.num_workers=1"]
    outcome = kill_and_compare(tmp_path, options, num_kills=4, seed=SEED)
    assert outcome.faults == [], summary(outcome)
    assert len(outcome.kills) >= 4
    assert outcome.num_in_writing >= 2
    assert outcome.kills[0].checkpoint == 0
    assert outcome.started_again == []  # with a checkpoint or not: it is resumed where it is
    assert any(kill.alone for kill in outcome.kills)
    assert outcome.kills[-1].step == outcome.steps


def test_the_moments_of_the_kills_are_spread_over_the_run() -> None:
    num_steps, moments = plan(50, seed=7)
    kinds = [moment.kind for moment in moments]
    assert len(moments) == 50
    assert kinds.count("write") == 25
    assert kinds[0] == "start"
    assert kinds[-1] == "end"
    assert {"start", "step", "rename"} <= set(kinds[5:-5])
    steps = [moment.step for moment in moments]
    assert steps == sorted(steps)
    assert steps[-1] == num_steps
    assert plan(50, seed=7)[1] == moments
    assert plan(50, seed=8)[1] != moments


LONG_STEPS = (
    "model.vocab_size=32768",  # the checkpoint has 25 MB
    "model.dropout=0.1",
    "data.seq_len=32",
    "data.num_workers=1",
    "training.max_steps=6",
    "training.batch_size=16",
    "training.micro_batch_size=1",
    "training.checkpoint={every_steps: 2, keep: 9}",
    "training.log_every=1",
    "training.sample.prompts=[]",
    "monitoring.sinks=[console, jsonl]",
)


def wait(condition: Callable[[], bool], timeout_s: float = 20) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_a_second_ctrl_c_ends_at_once_and_does_no_harm(tmp_path: Path) -> None:
    def train(name: str, *words: str) -> Session:
        return Session(tmp_path, tmp_path / "runs" / name, "train", *words)

    def newest(session: Session) -> int:
        return max(evidence.steps(session.run), default=0)

    def interrupt(session: Session) -> None:
        session.signal_all(signal.SIGINT)

    def ends_without_harm(session: Session) -> None:
        session.wait_until(lambda: False)
        assert session.process.returncode == 130, session.complaint()
        assert "Traceback" not in session.stderr
        assert session.stderr.rstrip().endswith("interrupted")
        assert wait(lambda: session.survivors() == [])
        assert evidence.unsound(session.run) == []

    def reported(session: Session) -> bool:
        return "once more ends the run at once" in session.stderr

    sessions = [train("whole", "debug", *LONG_STEPS, "run.name=whole")]
    try:
        sessions[0].finish()
        begun = train("stopped", "debug", *LONG_STEPS, "run.name=stopped")
        sessions.append(begun)
        # In the middle of a step: neither it nor its checkpoint is waited for.
        assert begun.wait_until(lambda: begun.step() >= 3 and newest(begun) >= 2)
        step = begun.step()
        interrupt(begun)
        assert begun.wait_until(lambda: reported(begun)), begun.complaint()
        interrupt(begun)
        ends_without_harm(begun)
        assert begun.step() == step
        assert newest(begun) <= step

        resumed = train("stopped", "--resume", "stopped")
        sessions.append(resumed)
        # While the checkpoint is written that the first Ctrl-C asked for.
        assert resumed.wait_until(lambda: resumed.step() > 0)
        interrupt(resumed)
        assert resumed.wait_until(resumed.is_writing), resumed.complaint()
        interrupt(resumed)
        ends_without_harm(resumed)

        sessions.append(train("stopped", "--resume", "stopped"))
        sessions[-1].finish()
    finally:
        for session in sessions:
            session.kill()
    assert evidence.differences(sessions[0].run, sessions[-1].run) == []
