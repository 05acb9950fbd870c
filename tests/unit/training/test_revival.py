"""An expert re-initialized: what it becomes, what stays, and what is refused."""

import json
import re
from typing import Any

import pytest
import torch

from tests.unit.training.conftest import MakeTrainer
from tests.unit.training.experts import MIXTURE, ROUTING
from tests.unit.training.observers import At, Recorder, asks, assert_equal_tensors, final_state
from ultrathink.recipes.resume import resume_trainer
from ultrathink.training.change import Change
from ultrathink.training.changes import ReviveExperts, SetRouting, Stop
from ultrathink.training.host_states import copied_to_host
from ultrathink.training.trainer import Trainer

UNREACHABLE = -1e4
ONE_EXPERT = ("model.moe={groups: [{name: a, num_experts: 1, top_k: 1}], intermediate_size: 16}",)
OPTIMIZERS = ("{type: adamw, lr: 0.003}", "{type: muon}", "{type: muon, experts: adamw}")


def kill(trainer: Trainer, slot: int = 2) -> None:
    """Keep every token away from an expert of group ``a``."""
    for layer in trainer.model.expert_layers().values():
        layer.router.selection_bias[slot] = UNREACHABLE


def revival(*experts: int, layer: int = 1, group: str = "a") -> ReviveExperts:
    return ReviveExperts([{"layer": layer, "group": group, "expert": each} for each in experts])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_becomes_the_busiest_one_and_a_little_noise(
    make_trainer: MakeTrainer, optimizer: str
) -> None:
    recorder = Recorder()
    trainer = make_trainer(
        *MIXTURE,
        ROUTING,
        "training.max_steps=40",
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
    drawn = torch.get_rng_state()
    asks(revival(2))(trainer.control)
    trainer.apply_changes()
    assert torch.equal(torch.get_rng_state(), drawn)  # what else is drawn stays the same
    after: dict[str, Any] = copied_to_host(trainer.state_dict())
    loads = [trainer.train_step().experts for _ in range(8)]
    assert sum(int(load.load[0, 2]) for load in loads if load is not None) > 8
    trainer.close()
    [change] = recorder.changes
    place = {"layer": 1, "group": "a", "expert": 2}
    assert change.before == [{**place, "tokens": 0}]
    assert change.after == [{**place, "from": source}]
    assert load[2] == 0
    layer = "blocks.1.feed_forward."
    for name, old in before["model"].items():
        new, inside = after["model"][name], name.removeprefix(layer)
        kept = ("router.active", "router.side", "router.branch")
        if not name.startswith(layer) or inside in kept or "shared" in name:
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


def test_several_do_not_all_copy_the_same_one(make_trainer: MakeTrainer) -> None:
    """Each takes half of the tokens of its source, also from one request to the next."""
    recorder = Recorder()
    trainer = make_trainer(*MIXTURE, ROUTING, "training.max_steps=9", callbacks=[recorder])
    trainer.start()
    trainer.train_step()
    load = torch.tensor([[40.0, 90, 0, 0, 0, 0, 0, 0, 1, 1, 1]] * 2)
    trainer.boundary.expert_load = load
    asks(revival(2, 3), revival(5))(trainer.control)
    trainer.apply_changes()
    trainer.close()
    # 90 is halved to 45 and 45, of which the first is halved again; then 45 and 40 are the most.
    sources = [one["from"] for change in recorder.changes for one in change.after]
    assert sources == [1, 1, 2]


def test_it_continues_bit_for_bit_after_a_resume(make_trainer: MakeTrainer) -> None:
    wanted = [revival(2), revival(1, group="b", layer=2)]
    states = []
    for changes in (wanted, [*wanted, Stop()]):
        trainer = make_trainer(
            *MIXTURE, ROUTING, "training.max_steps=8", controllers=[At(step4=asks(*changes))]
        )
        if trainer.fit().name == "stopped":
            trainer = resume_trainer(trainer.run)
            trainer.fit()
        states.append(final_state(trainer.run))
        lines = [json.loads(line) for line in trainer.run.decisions.read_text().splitlines()]
        assert [(line["rule"], line["action"], line["reasoning"]) for line in lines[:2]] == [
            ("by_hand", "revive_experts", "test")
        ] * 2
        assert lines[0]["after"][0].keys() == {"layer", "group", "expert", "from"}
    assert_equal_tensors(*states)


@pytest.mark.parametrize(
    ("change", "model", "message"),
    [
        (revival(1, layer=0), MIXTURE, "expert 1 of group 'a' in layer 0 .* experts: 1, 2"),
        (revival(1, group="c"), MIXTURE, "of group 'c' in layer 1 cannot .* groups: a, b"),
        (revival(6), MIXTURE, "expert 6 of group 'a' .* the group has 0 to 5"),
        (revival(-1, group="b"), MIXTURE, "expert -1 of group 'b' .* the group has 0 to 2"),
        (revival(0), ONE_EXPERT, "expert 0 .* it is itself the busiest of its group"),
        (revival(3), (), "expert 3 of group 'a' in layer 1 .* this model has no experts"),
        (SetRouting("load", 0.1), (), "routing.load .* this model has no experts; model.moe gives"),
    ],
)
def test_what_there_is_not_is_reported_and_training_continues(
    make_trainer: MakeTrainer, change: Change, model: tuple[str, ...], message: str
) -> None:
    recorder = Recorder()
    act = At(step2=asks(change))
    trainer = make_trainer(*model, "training.max_steps=3", callbacks=[recorder], controllers=[act])
    assert trainer.fit().name == "finished"
    assert recorder.changes == []
    [reported] = [text for text in recorder.messages if "failed" in text]
    assert re.search(message, reported), reported
