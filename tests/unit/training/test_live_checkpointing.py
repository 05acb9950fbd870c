"""Keeping fewer activations from the middle of a run on."""

import resource
import sys
from typing import Any

import pytest
import torch

from tests.unit.training.conftest import MakeTrainer
from tests.unit.training.experts import MIXTURE, ROUTING
from tests.unit.training.observers import At, Recorder, asks, final_state
from ultrathink.core.errors import ConfigError
from ultrathink.recipes.resume import resume_trainer
from ultrathink.training.callbacks import Callback, StepReport
from ultrathink.training.changes import Rollback, SetActivationCheckpointing, SkipSamples, Stop
from ultrathink.training.control import TrainerControl
from ultrathink.training.memory import memory_in_use
from ultrathink.training.snapshots import Snapshot
from ultrathink.training.trainer import Trainer


def change_to(mode: str) -> Any:
    return asks(SetActivationCheckpointing(mode))


class CountsPasses(Callback):
    """How often the first block was begun in each step."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self._count = 0

    def watch(self, trainer: Trainer) -> None:
        trainer.model.blocks[0].register_forward_pre_hook(self._note)

    def on_step(self, report: StepReport) -> None:
        self.counts.append(self._count)
        self._count = 0

    def _note(self, *_: Any) -> None:
        self._count += 1


@pytest.mark.parametrize("words", [(), (*MIXTURE, ROUTING)])
def test_from_the_next_step_on_and_no_bit_of_a_gradient_changes(
    make_trainer: MakeTrainer, words: tuple[str, ...]
) -> None:
    states, norms = [], []
    for actions in ({}, {"step2": change_to("selective"), "step4": change_to("full")}):
        recorder, passes = Recorder(), CountsPasses()
        trainer = make_trainer(
            *words,
            "training.max_steps=6",
            "training.precision=fp32",
            "training.compile=false",
            "training.eval.every_steps=null",
            "training.micro_batch_size=4",
            "model.dropout=0.1",
            callbacks=[recorder, passes],
            controllers=[At(**actions)],
        )
        passes.watch(trainer)
        trainer.fit()
        states.append(final_state(trainer.run))
        norms.append([report.grad_norm for report in recorder.steps])
    assert norms[0] == norms[1]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert passes.counts == [1, 1, 2, 2, 2, 2]
    assert [(one.setting, one.before, one.after) for one in recorder.changes] == [
        ("activation_checkpointing", "none", "selective"),
        ("activation_checkpointing", "selective", "full"),
    ]


def test_a_resume_continues_with_it_unless_configured_otherwise(make_trainer: MakeTrainer) -> None:
    def act(control: TrainerControl) -> None:
        change_to("full")(control)
        control.request(Stop(), reason="test")

    trainer = make_trainer("training.max_steps=4", controllers=[At(step2=act)])
    trainer.fit()
    level = "training.activation_checkpointing"
    for overrides, expected in (([], "full"), ([f"{level}=selective"], "selective")):
        again = resume_trainer(trainer.run, overrides=overrides)
        assert again.settings.activation_checkpointing == expected
        assert again.model.activation_checkpointing == expected
        again.close()


def test_going_back_does_not_take_it_back(make_trainer: MakeTrainer) -> None:
    kept: list[Snapshot] = []

    def go_back(control: TrainerControl) -> None:
        if not trainer.loader.samples_skipped:
            control.request(Rollback(kept[0], skip_data=False), reason="test")
            control.request(SkipSamples(4), reason="test")

    def keep(control: TrainerControl) -> None:
        if not kept:
            kept.append(control.snapshot())

    def save(control: TrainerControl) -> None:
        if not trainer.loader.samples_skipped:  # once, not again after going back
            change_to("full")(control)

    trainer = make_trainer(
        "training.max_steps=5",
        controllers=[At(step1=keep, step2=save, step3=go_back)],
    )
    trainer.fit()
    assert trainer.loader.samples_skipped == 4
    assert trainer.model.activation_checkpointing == "full"
    assert trainer.settings.activation_checkpointing == "full"


def test_a_level_that_there_is_not_is_refused_at_once(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("training.max_steps=2")
    with pytest.raises(ConfigError, match=r"'ful'\. Did you mean .*full"):
        trainer.control.request(SetActivationCheckpointing("ful"), reason="test")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts what is addressed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="an accelerator has memory of its own")
def test_a_limited_address_space_is_what_runs_short() -> None:
    plain, before = memory_in_use(), resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", encoding="ascii") as file:
        addressed = int(file.read().split()[0]) * resource.getpagesize()
    try:
        resource.setrlimit(resource.RLIMIT_AS, (addressed + 2**30, before[1]))
        limited = memory_in_use()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    if plain["memory_limit"] <= (addressed + 2**30) / 2**30:
        assert limited == plain
        pytest.skip("this host has less memory than this process addresses")
    assert limited["memory_limit"] == pytest.approx(addressed / 2**30 + 1)
    assert limited["memory"] == pytest.approx(addressed / 2**30, rel=0.1)
    assert plain["memory"] < limited["memory"]
