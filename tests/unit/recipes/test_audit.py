"""Decisions replayed with and without them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.orchestrator.steering.broken_runs import (
    ACT,
    broken_run,
    scale_a_weight,
    steering_of,
)
from tests.unit.training.all_changes import one_of_each
from tests.unit.training.conftest import MakeTrainer, make_trainer
from ultrathink.cli.main import main
from ultrathink.core.errors import UltrathinkError
from ultrathink.orchestrator.steering.proposals import CRITICAL, Proposal
from ultrathink.orchestrator.steering.rules import Rule, Situation
from ultrathink.recipes.audit import _replay, audit_run, branch
from ultrathink.runs.decisions import read_decisions
from ultrathink.training.callbacks import Callback, StepReport
from ultrathink.training.change import Change
from ultrathink.training.changes import CHANGES
from ultrathink.training.host_states import copied_to_host
from ultrathink.training.model_state import OptimizerState
from ultrathink.training.records import ChangeRecord
from ultrathink.training.snapshots import Snapshot
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


REFUSED = {
    ("decision", 99): r"has no decision 99; there are 1 to \d+",
    ("orders", 1): "--orders 1: an interval needs 2",
    ("horizon", 0): "--horizon 0: give a number of steps",
}


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
    # The first order continues with the run's own data, so it comes to the run's own loss.
    loss = _replay(broken.run, record, 0, 140 - record["step"], acts=True)
    assert loss == broken.score().loss
    for arguments, message in REFUSED.items():
        with pytest.raises(UltrathinkError, match=message):
            audit_run(broken.run, **dict([arguments]))
    shutil.rmtree(broken.run.states)
    with pytest.raises(UltrathinkError, match=r"the state before decision 1 is gone.*kept: none"):
        audit_run(broken.run, decision=1)
    broken.run.decisions.unlink()
    with pytest.raises(UltrathinkError, match="has no decisions to audit"):
        audit_run(broken.run)


class OneOfEach(Rule):
    """Decides on every change of the table, one at a boundary, beginning after step 6."""

    name = "one_of_each"
    cool_down = 0

    def __init__(self) -> None:
        self.left: list[Change] | None = None

    def propose(self, now: Situation) -> Proposal | None:
        if now.step < 6:
            return None
        if self.left is None:
            kept = [now.snapshots.before(step) for step in (5, 3)]
            assert now.experts is not None
            self.left = one_of_each(
                *(one.snapshot for one in kept if one is not None),
                expert=int(now.experts.load[1, :4].argmin()),
            )
        return Proposal(self.name, CRITICAL, 1.0, (self.left.pop(0),), "test")


def standing(trainer: Trainer) -> dict[str, Any]:
    """All of a run that a change may touch, and that the next steps follow from."""
    settings = json.loads(json.dumps(trainer.settings.state_dict()))  # as a checkpoint has it
    del settings["eval_every"]  # a replay does not validate on its way
    return {
        "settings": settings,
        "data": trainer.loader.state_dict(),
        "model": copied_to_host(dict(trainer.model.state_dict())),
        "optimizer": copied_to_host(OptimizerState(trainer.stepper).state_dict()),
        "rate": trainer.length.lr_factor(trainer.progress.step + 1),
        "options": [
            {key: group[key] for key in ("betas", "eps")}
            for optimizer in trainer.stepper.optimizers
            for group in optimizer.param_groups
            if "betas" in group
        ],
        "step": trainer.progress.step,
        "ending": trainer.ending,
    }


@pytest.mark.long
def test_every_change_that_a_decision_can_hold_is_replayed(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    stood: dict[int, dict[str, Any]] = {}

    class Watching(Callback):
        def on_step(self, report: StepReport) -> None:
            if report.step == 23:  # so that the mean of weights, asked for now, is the better one
                with torch.no_grad():
                    for weight in (p for p in trainer.model.parameters() if p.numel() > 1):
                        weight.add_(3.0 * weight.std() * torch.randn_like(weight))

        def on_change(self, record: ChangeRecord) -> None:
            assert record.decision is not None
            stood[record.decision] = standing(trainer)

    trainer = make_trainer(
        ACT,
        "training.max_steps=60",
        "training.schedule={type: wsd, warmup: 2, decay: 0}",
        "training.eval.max_tokens=1024",
        "training.optimizer={type: adamw, lr: 0.02}",
        "model.moe={groups: [{name: a, num_experts: 4, top_k: 1, max_experts: 6}], "
        "intermediate_size: 16}",
        "model.mod={layers: all}",
        "data.train=[{type: dummy, name: a}, {type: dummy, name: b, seed: 3}]",
        "orchestrator.snapshots.every_steps=2",
        "orchestrator.kept_states=100",
        callbacks=[Watching()],
    )
    steering = steering_of(trainer)
    steering.policy.rules = [OneOfEach()]
    assert trainer.fit().name == "stopped"
    made = read_decisions(trainer.run.decisions)
    assert [change["change"] for one in made for change in one["changes"]] == [
        change.name for change in one_of_each(Snapshot(0, 0))
    ]
    felt = {kind.name for kind in CHANGES if kind.is_felt}
    replayed = set()
    for record in made:
        [change] = record["changes"]
        if change["change"] not in felt:
            continue
        again = branch(trainer.run, record, tmp_path / str(record["id"]), acts=True)
        again.length.follow_settings()
        assert differing(stood[record["id"]], standing(again)) == [], record["action"]
        without = branch(trainer.run, record, tmp_path / f"{record['id']}-no", acts=False)
        without.length.follow_settings()
        assert differing(stood[record["id"]], standing(without)), record["action"]
        again.close()
        without.close()
        replayed.add(change["change"])
    assert replayed == felt


def differing(here: dict[str, Any], there: dict[str, Any]) -> list[str]:
    return [name for name in here if not same(here[name], there[name])]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)
