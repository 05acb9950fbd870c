"""Runs of a mixture: live controls, warm-up, resuming, and weights of other runs."""

from __future__ import annotations

import re

import pytest
import torch

from tests.stress.evidence import differences
from tests.unit.training.conftest import MakeTrainer
from tests.unit.training.experts import GROUPS, MIXTURE, NOISE, ROUTING
from tests.unit.training.observers import At, Recorder, asks, assert_equal_tensors
from tests.unit.training.test_resume_matrix import whole_and_resumed
from ultrathink import load_model, resume_trainer
from ultrathink.core.errors import CheckpointError, UltrathinkError
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.inspection import consolidate
from ultrathink.training.changes import SetRouting, Stop

GROUPS_OF_16 = "{groups: [{name: all, num_experts: 16, top_k: 2}], intermediate_size: 8}"
TWO_OF_8 = (
    "{groups: [{name: knowledge, num_experts: 8, top_k: 1}, "
    "{name: skill, num_experts: 8, top_k: 1}], intermediate_size: 8}"
)


@pytest.mark.parametrize(
    "options",
    [
        ("training.optimizer={type: adamw, lr: 0.01}", "training.precision=fp32"),
        (
            "training.optimizer={type: muon, lr: 0.01}",
            "training.precision=bf16",
            "training.micro_batch_size=2",
        ),
    ],
    ids=["adamw", "muon"],
)
def test_a_run_that_broke_off_continues_bit_for_bit(
    make_trainer: MakeTrainer, options: tuple[str, ...]
) -> None:
    """Noise, warm-up, biases and dropped tokens included."""
    every = "training.checkpoint={every_steps: 2, keep: 9}"
    whole, resumed = whole_and_resumed(make_trainer, *MIXTURE, NOISE, *options, every)
    assert differences(whole, resumed) == []


def test_live_controls_are_recorded_and_survive_a_resume(make_trainer: MakeTrainer) -> None:
    act = asks(SetRouting("capacity_factor", 0.5), SetRouting("load", 0.7))
    stop = asks(SetRouting("capacity_factor", None), SetRouting("temperature", 1.5), Stop())
    recorder = Recorder()
    trainer = make_trainer(
        *MIXTURE,
        "model.moe.routing={warmup_steps: 0}",
        "training.max_steps=6",
        callbacks=[recorder],
        controllers=[At(step2=act, step4=stop)],
    )
    assert trainer.fit().name == "stopped"
    changes = [(c.step, c.setting, c.before, c.after) for c in recorder.changes[:4]]
    assert changes == [
        (2, "routing.capacity_factor", None, 0.5),
        (2, "routing.load", pytest.approx(0.1), pytest.approx(0.7)),
        (4, "routing.capacity_factor", 0.5, None),
        (4, "routing.temperature", 1.0, 1.5),
    ]
    dropped = [float(report.experts.dropped.sum()) for report in recorder.steps if report.experts]
    assert [value > 0 for value in dropped] == [False, False, True, True]
    ratio = recorder.steps[2].aux_losses["moe_load"] / recorder.steps[1].aux_losses["moe_load"]
    assert ratio == pytest.approx(7, rel=0.1)

    resumed = resume_trainer(trainer.run)
    resumed.close()
    for model in (resumed.model, load_model(trainer.run.path, "last")[0]):
        assert model.routing is not None
        assert model.routing.get("capacity_factor") is None
        assert model.routing.get("temperature") == 1.5
        assert model.routing.get("load") == pytest.approx(0.7)


def test_warm_up_begins_nearly_even(make_trainer: MakeTrainer) -> None:
    """A router that has favourites by its weights, at some steps of the default warm-up."""
    trainer = make_trainer(
        *MIXTURE,
        "model.moe.balance.bias_rate=0",
        "training.optimizer={type: adamw, lr: 1.0e-9}",
        "training.batch_size=16",
        "training.max_steps=200",
    )
    with torch.no_grad():
        for layer in trainer.model.expert_layers().values():
            layer.router.weight.mul_(20)
    trainer.start()
    spread = {}
    for step in (1, 20, 100, 150):
        trainer.progress.step = step - 1
        experts = trainer.train_step().experts
        assert experts is not None
        assert (experts.layers, experts.active.sum(1).tolist()) == ((1, 2), [9, 9])
        load = experts.load[:, GROUPS[0]]
        spread[step] = float((load.std(1) / load.mean(1)).max())
    trainer.close()
    assert spread[1] < 0.1 < spread[20] < spread[100]
    assert spread[100] > 0.4
    assert spread[150] == pytest.approx(spread[100], rel=0.2)  # learned from here on


def test_another_configuration_says_how_tokens_find_experts_of_a_run_it_begins_with(
    make_trainer: MakeTrainer, finished: MakeTrainer
) -> None:
    first = finished(*MIXTURE, ROUTING, "training.max_steps=3")
    second = make_trainer(
        *MIXTURE,
        "model.moe.routing={temperature: 0.5, warmup_steps: 7}",
        "model.moe.balance.load=0.9",
        f"training.init_from={first.run.path}",
    )
    routing = second.model.routing
    assert routing is not None
    assert (routing.get("temperature"), routing.get("capacity_factor")) == (0.5, None)
    assert routing.get("load") == pytest.approx(0.9)
    assert routing.config.routing.warmup_steps == 7
    learned = [{n: v for n, v in trainer.model.state_dict().items() if "routing." not in n}
               for trainer in (second, first)]  # fmt: skip
    assert_equal_tensors(*learned)
    second.close()


@pytest.fixture
def two_of_8(finished: MakeTrainer) -> RunFolder:
    return finished(f"model.moe={TWO_OF_8}", "training.max_steps=1").run


def test_learned_routing_is_not_warmed_up_again(
    make_trainer: MakeTrainer, two_of_8: RunFolder
) -> None:
    second = make_trainer(f"model.moe={TWO_OF_8}", f"training.init_from={two_of_8.path}")
    assert second.model.config.moe is not None
    assert second.model.config.moe.routing.warmup_steps == 0
    second.start()
    second.train_step()
    assert second.model.routing is not None
    assert second.model.routing.get("warmup") == 1.0
    second.close()


def test_weights_of_other_groups_are_refused_though_their_shapes_agree(
    make_trainer: MakeTrainer, two_of_8: RunFolder
) -> None:
    reported = "it has the expert groups knowledge 8 + skill 8, but this one has"
    renamed = TWO_OF_8.replace("skill", "talent")
    for source in (two_of_8.path, consolidate(two_of_8, "last")[0]):
        with pytest.raises(
            CheckpointError, match=re.escape(f"{reported} the expert groups all 16")
        ):
            make_trainer(f"model.moe={GROUPS_OF_16}", f"training.init_from={source}")
        with pytest.raises(CheckpointError, match=re.escape(f"{reported} no experts")):
            make_trainer(f"training.init_from={source}")
        make_trainer(f"model.moe={renamed}", f"training.init_from={source}").close()


def test_a_run_keeps_its_groups_when_it_is_resumed(two_of_8: RunFolder) -> None:
    for change in (f"model.moe={GROUPS_OF_16}", "model.moe=null"):
        with pytest.raises(UltrathinkError, match=r"model\.moe\S* cannot change to "):
            resume_trainer(two_of_8, overrides=[change, "training.max_steps=2"])
