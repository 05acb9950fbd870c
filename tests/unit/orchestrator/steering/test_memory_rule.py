"""Memory runs short: fewer activations are kept, in steps that only go up."""

from typing import Any

import pytest

from tests.unit.orchestrator.steering.test_policy import policy_for, situation
from tests.unit.orchestrator.steering.test_steering import ACT, decisions
from tests.unit.training.conftest import MakeTrainer, make_trainer
from tests.unit.training.observers import final_state
from ultrathink.config import load_config
from ultrathink.config.orchestrator import LimitsConfig
from ultrathink.core.errors import ConfigError
from ultrathink.training.changes import SetActivationCheckpointing
from ultrathink.training.settings import LiveSettings

__all__ = ["make_trainer"]


def level(share: float, now: str = "none", **given: Any) -> str | None:
    values = {"memory": 10 * share, "memory_limit": 10.0}
    found = policy_for("save_memory").decide(
        situation(
            **{"values": values, **given}, settings=LiveSettings(activation_checkpointing=now)
        )
    )
    if found is None:
        return None
    [change] = found.changes
    assert isinstance(change, SetActivationCheckpointing)
    return change.mode


@pytest.mark.parametrize(
    ("share", "now", "then"),
    [
        (0.69, "none", None),
        (0.71, "none", "selective"),
        (0.86, "none", "full"),
        (0.71, "selective", None),
        (0.86, "selective", "full"),
        (0.71, "full", None),
        (0.99, "full", None),
    ],
)
def test_more_in_use_means_less_kept_and_never_the_reverse(
    share: float, now: str, then: str | None
) -> None:
    assert level(share, now) == then


def test_a_compiled_step_goes_to_full_at_once() -> None:
    """There ``selective`` holds more than ``none``."""
    assert level(0.71, is_compiled=True) == "full"
    assert level(0.69, is_compiled=True) is None


def test_the_peak_counts_and_the_fullest_process() -> None:
    peak = {"memory": 1.0, "memory_peak": 8.0, "memory_limit": 10.0}
    assert level(0.0, values=peak) == "selective"
    assert level(0.1, memory_share=0.9) == "full"
    assert level(0.0, values={"memory": 9.0}) is None  # of an unknown whole


def test_the_user_sets_the_shares() -> None:
    assert level(0.71, limits=LimitsConfig(memory=(0.8, 0.9))) is None
    with pytest.raises(ConfigError, match=r"memory \[0.9, 0.8\] are no two shares in order"):
        load_config("debug", ["orchestrator.limits.memory=[0.9, 0.8]"])


def test_a_run_saves_memory_and_learns_the_same(make_trainer: MakeTrainer) -> None:
    """This process takes more than a thousandth of a per cent of the host's memory."""
    states = []
    for rules in ("{save_memory: true}", "{save_memory: false}"):
        trainer = make_trainer(
            ACT,
            "orchestrator.limits.memory=[1.0e-5, 1.0]",
            f"orchestrator.rules={rules}",
            "training.max_steps=30",
            "training.precision=fp32",
            "training.compile=false",
        )
        trainer.fit()
        states.append(final_state(trainer.run))
        found = decisions(trainer, "save_memory")
        if "false" in rules:
            assert found == []
            continue
        [decision] = found
        assert (decision["step"], decision["action"]) == (1, "activation_checkpointing")
        assert (decision["before"], decision["after"]) == ("none", "selective")
        assert 1e-5 < decision["signals"]["memory_share"] < 1
        assert trainer.model.activation_checkpointing == "selective"
        assert trainer.run.kept_states() == []  # an audit would find no difference
    assert all((states[0][name] == states[1][name]).all() for name in states[0])
