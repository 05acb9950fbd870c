"""Decisions replayed with and without them."""

import json
import shutil
from typing import Any

import pytest

from tests.unit.orchestrator.steering.test_steering import ACT, broken_run, scale_a_weight
from tests.unit.training.conftest import MakeTrainer, make_trainer
from ultrathink.cli.main import main
from ultrathink.core.errors import UltrathinkError
from ultrathink.recipes.audit import audit_run
from ultrathink.runs.decisions import read_decisions
from ultrathink.training.trainer import Trainer

__all__ = ["make_trainer"]


@pytest.fixture
def broken(make_trainer: MakeTrainer) -> Trainer:
    """A run whose weights were broken and taken back, its one decision of that kind."""
    return broken_run(
        make_trainer,
        110,
        scale_a_weight,
        ACT,
        "orchestrator.rules.skip_outliers=false",
        "training.eval.max_tokens=2048",
    )


def test_going_back_from_broken_weights_is_found_to_help(
    broken: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path for path in broken.run.path.rglob("*"))
    files = {path: path.read_bytes() for path in before if path.is_file()}
    [record] = [one for one in read_decisions(broken.run.decisions) if one["rule"] == "roll_back"]
    assert main(["audit", str(broken.run.path), "--orders", "3", "--horizon", "15", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)[str(record["id"])]
    assert result["high"] < 0
    assert result["low"] <= result["mean"] <= result["high"]
    assert len(set(result["differences"])) == 3  # each order has data of its own
    assert (result["orders"], result["horizon"]) == (3, 15)
    [audited] = [one for one in read_decisions(broken.run.decisions) if one["id"] == record["id"]]
    assert audited["audit"] == result
    files.pop(broken.run.decisions)
    assert all(path.read_bytes() == data for path, data in files.items()), "the run is as it was"


def test_a_replay_with_the_decision_is_what_the_run_did(broken: Trainer) -> None:
    """The first order goes on with the run's own data, so it comes to the run's own loss."""
    [record] = [one for one in read_decisions(broken.run.decisions) if one["rule"] == "roll_back"]
    from ultrathink.recipes.audit import _replay

    left = 140 - record["step"]
    loss = _replay(broken.run, record, 0, left, acts=True)
    assert loss == broken.score().loss


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decision": 99}, r"has no decision 99; there are 1 to \d+"),
        ({"orders": 1}, "--orders 1: an interval needs 2"),
        ({"horizon": 0}, "--horizon 0: give a number of steps"),
    ],
)
def test_what_cannot_be_audited(broken: Trainer, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UltrathinkError, match=message):
        audit_run(broken.run, **arguments)


def test_a_state_that_is_gone(broken: Trainer) -> None:
    shutil.rmtree(broken.run.states)
    with pytest.raises(UltrathinkError, match=r"the state before decision 1 is gone.*kept: none"):
        audit_run(broken.run, decision=1)


def test_a_run_without_decisions(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("training.max_steps=2")
    trainer.fit()
    with pytest.raises(UltrathinkError, match="has no decisions to audit"):
        audit_run(trainer.run)
