"""An expert re-initialized: what it becomes, what stays, and what is refused."""

import json
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.training.conftest import MakeTrainer
from tests.unit.training.experts import MIXTURE, ROUTING
from tests.unit.training.observers import At, Recorder, asks, final_state
from ultrathink.recipes.resume import resume_trainer
from ultrathink.training.change import Change
from ultrathink.training.changes import ReviveExperts, SetRouting, Stop
from ultrathink.training.control import TrainerControl
from ultrathink.training.host_states import copied_to_host
from ultrathink.training.trainer import Trainer

UNREACHABLE = -1e4
OPTIMIZERS = ("{type: adamw, lr: 0.003}", "{type: muon}", "{type: muon, experts: adamw}")


def kill(trainer: Trainer, slot: int = 2) -> None:
    """Keep every token away from an expert of group ``a``."""
    for layer in trainer.model.expert_layers().values():
        layer.router.selection_bias[slot] = UNREACHABLE


def revive(*experts: int, layer: int = 1, group: str = "a") -> list[dict[str, Any]]:
    return [{"layer": layer, "group": group, "expert": expert} for expert in experts]


def trained(make: MakeTrainer, *overrides: str, steps: int = 4) -> Trainer:
    """A trainer of a mixture whose expert 2 of group ``a`` is dead, between two steps."""
    trainer = make(*MIXTURE, ROUTING, "training.max_steps=40", *overrides)
    trainer.start()
    kill(trainer)
    for _ in range(steps):
        trainer.train_step()
    return trainer


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_becomes_the_busiest_one_and_a_little_noise(
    make_trainer: MakeTrainer, optimizer: str
) -> None:
    recorder = Recorder()
    trainer = make_trainer(
        *MIXTURE,
        ROUTING,
        "training.max_steps=9",
        f"training.optimizer={optimizer}",
        callbacks=[recorder],
    )
    trainer.start()
    kill(trainer)
    for _ in range(4):
        report = trainer.train_step()
    assert report.experts is not None
    load = report.experts.load[0, :6]
    source = int(load.argmax())
    before: dict[str, Any] = copied_to_host(trainer.state_dict())
    trainer.control.request(ReviveExperts(revive(2)), reason="test")
    trainer.apply_changes()
    after: dict[str, Any] = trainer.state_dict()
    trainer.close()
    [change] = recorder.changes
    place = {"layer": 1, "group": "a", "expert": 2}
    assert change.before == [{**place, "tokens": 0}]
    assert change.after == [{**place, "from": source}]
    assert load[2] == 0
    layer = "blocks.1.feed_forward."
    for name, old in before["model"].items():
        new, inside = after["model"][name], name.removeprefix(layer)
        if not name.startswith(layer) or inside in ("router.active",) or "shared" in name:
            assert torch.equal(new, old), name
            continue
        others = torch.arange(len(old)) != 2
        assert torch.equal(new[others], old[others]), name
        if inside == "router.selection_bias":
            assert new[2] == old[source] > UNREACHABLE
        else:
            noise = (new[2] - old[source]).std() / old[source].std()
            assert noise == pytest.approx(0.1 if "router" in name else 0.03, rel=0.35), name
    for name, values in before["optimizer"].items():
        for key, old in values.items():
            new = after["optimizer"][name][key]
            is_of_experts = name.startswith(layer) and "shared" not in name
            if is_of_experts and old.ndim > 1:
                assert not new[2].any(), (name, key)
                others = torch.arange(len(old)) != 2
                new, old = new[others], old[others]
            assert torch.equal(new, old), (name, key)


def test_it_has_tokens_again_and_had_none_before(make_trainer: MakeTrainer) -> None:
    won = {}
    for is_revived in (False, True):
        trainer = trained(make_trainer, "training.optimizer.lr=0.001")
        if is_revived:
            trainer.control.request(ReviveExperts(revive(2)), reason="test")
            trainer.apply_changes()
        loads = [trainer.train_step().experts for _ in range(8)]
        trainer.close()
        won[is_revived] = sum(int(load.load[0, 2]) for load in loads if load is not None)
    assert won[False] == 0
    assert won[True] > 8


def test_several_do_not_all_copy_the_same_one(make_trainer: MakeTrainer) -> None:
    """Each takes half of the tokens of its source, also from one request to the next."""
    recorder = Recorder()
    trainer = make_trainer(*MIXTURE, ROUTING, "training.max_steps=9", callbacks=[recorder])
    trainer.start()
    trainer.train_step()
    load = torch.tensor([[40.0, 90, 0, 0, 0, 0, 0, 0, 1, 1, 1]] * 2)
    trainer.boundary.expert_load = load
    trainer.control.request(ReviveExperts(revive(2, 3)), reason="test")
    trainer.control.request(ReviveExperts(revive(5)), reason="test")
    trainer.apply_changes()
    trainer.close()
    # 90 is halved to 45 and 45, of which the first is halved again; then 45 and 40 are the most.
    sources = [one["from"] for change in recorder.changes for one in change.after]
    assert sources == [1, 1, 2]


def test_it_continues_bit_for_bit_after_a_resume(make_trainer: MakeTrainer) -> None:
    def act(control: TrainerControl) -> None:
        control.request(ReviveExperts(revive(2) + revive(1, group="b", layer=2)), reason="test")

    def act_and_stop(control: TrainerControl) -> None:
        act(control)
        control.request(Stop(), reason="test")

    states = []
    for action in (act, act_and_stop):
        trainer = make_trainer(
            *MIXTURE, ROUTING, "training.max_steps=8", controllers=[At(step4=action)]
        )
        if trainer.fit().name == "stopped":
            trainer = resume_trainer(trainer.run)
            trainer.fit()
        states.append(final_state(trainer.run))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_what_else_is_drawn_stays_the_same(make_trainer: MakeTrainer) -> None:
    trainer = trained(make_trainer)
    before: Tensor = torch.get_rng_state()
    trainer.control.request(ReviveExperts(revive(2)), reason="test")
    trainer.apply_changes()
    trainer.close()
    assert torch.equal(torch.get_rng_state(), before)


def revival(layer: int, group: str, expert: int) -> ReviveExperts:
    return ReviveExperts([{"layer": layer, "group": group, "expert": expert}])


def complaints(make: MakeTrainer, change: Change, *overrides: str) -> list[str]:
    """What a run says of a change that was asked for by hand."""
    recorder = Recorder()
    trainer = make(
        *overrides,
        "training.max_steps=3",
        callbacks=[recorder],
        controllers=[At(step2=asks(change))],
    )
    assert trainer.fit().name == "finished"
    assert recorder.changes == []
    return [text for text in recorder.messages if "failed" in text]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ((0, "a", 1), "expert 1 of group 'a' in layer 0 .* layers with experts: 1, 2"),
        ((7, "a", 1), "in layer 7 cannot be revived: .* layers with experts: 1, 2"),
        ((1, "c", 1), "of group 'c' in layer 1 cannot be revived: .* groups: a, b"),
        ((1, "a", 6), "expert 6 of group 'a' .* the group has 0 to 5"),
        ((1, "b", -1), "expert -1 of group 'b' .* the group has 0 to 2"),
    ],
)
def test_what_there_is_not_is_said_once(
    make_trainer: MakeTrainer, place: tuple[int, str, int], message: str
) -> None:
    [reported] = complaints(make_trainer, revival(*place), *MIXTURE)
    assert_matches(reported, message)


def test_the_busiest_cannot_be_its_own_copy(make_trainer: MakeTrainer) -> None:
    one = "model.moe={groups: [{name: a, num_experts: 1, top_k: 1}], intermediate_size: 16}"
    [reported] = complaints(make_trainer, revival(0, "a", 0), one)
    assert_matches(
        reported, "expert 0 of group 'a' in layer 0 .* it is itself the busiest of its group"
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (SetRouting("capacity_factor", 1.5), "routing.capacity_factor"),
        (SetRouting("load", 0.1), "routing.load"),
        (revival(1, "a", 3), "expert 3 of group 'a' in layer 1"),
    ],
)
def test_a_dense_model_has_no_experts_to_change(
    make_trainer: MakeTrainer, change: Change, named: str
) -> None:
    [reported] = complaints(make_trainer, change)
    assert named in reported
    assert "this model has no experts; model.moe gives it some" in reported


def test_it_is_recorded_by_hand(make_trainer: MakeTrainer) -> None:
    act = At(step3=lambda control: control.request(revival(2, "b", 1), reason="it slept"))
    trainer = make_trainer(*MIXTURE, "training.max_steps=4", controllers=[act])
    trainer.fit()
    [line] = [json.loads(line) for line in trainer.run.decisions.read_text().splitlines()]
    assert (line["rule"], line["action"], line["reasoning"]) == (
        "by_hand",
        "revive_experts",
        "it slept",
    )
    assert line["after"][0].keys() == {"layer", "group", "expert", "from"}


def assert_matches(text: str, pattern: str) -> None:
    assert re.search(pattern, text), text
