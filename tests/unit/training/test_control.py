import json
from typing import Any

import pytest
import torch

from tests.unit.training.conftest import MakeTrainer
from tests.unit.training.observers import At, Recorder, asks, records
from ultrathink.recipes.resume import resume_trainer
from ultrathink.training.changes import (
    AverageSnapshots,
    Rollback,
    SaveCheckpoint,
    SetClip,
    SetLearningRateFactor,
    SetMicroBatchSize,
    SetMixtureWeights,
    SetWeightDecay,
    SkipSamples,
    Stop,
)
from ultrathink.training.control import ControlQueue, TrainerControl
from ultrathink.training.snapshots import Snapshot


def test_changes_wait_for_the_boundary_and_are_recorded(make_trainer: MakeTrainer) -> None:
    def act(control: TrainerControl) -> None:
        control.request(SetLearningRateFactor(0.5), reason="loss spiked")
        control.request(SetClip(0.1), reason="gradient grew")
        control.request(SetWeightDecay(0.2), reason="overfitting")
        control.request(SetMicroBatchSize(3), reason="memory")
        control.request(SkipSamples(8), reason="bad batch")

    recorder = Recorder()
    trainer = make_trainer(
        "training.max_steps=4",
        "training.schedule.warmup=0",
        "training.schedule.min_ratio=1.0",
        callbacks=[recorder],
        controllers=[At(step2=act)],
    )
    trainer.fit()
    rates = [report.lr for report in recorder.steps]
    assert rates == pytest.approx([0.003, 0.003, 0.0015, 0.0015])
    assert [(c.setting, c.before, c.after) for c in recorder.changes] == [
        ("lr_factor", 1.0, 0.5),
        ("clip", 1.0, 0.1),
        ("weight_decay", None, 0.2),
        ("micro_batch_size", 4, 2),  # the largest divisor of 4 that is not above 3
        ("skip_samples", 0, 8),
    ]
    lines = [json.loads(line) for line in trainer.run.decisions.read_text().splitlines()]
    assert next(line["reasoning"] for line in lines) == "loss spiked"
    assert {line["step"] for line in lines} == {2}
    assert (trainer.loader.samples_seen, trainer.loader.samples_skipped) == (16, 8)


def test_changed_settings_survive_a_resume(make_trainer: MakeTrainer) -> None:
    def act(control: TrainerControl) -> None:
        control.request(SetLearningRateFactor(0.25), reason="test")
        control.request(Stop(), reason="test")

    trainer = make_trainer("training.max_steps=4", controllers=[At(step2=act)])
    trainer.fit()
    assert resume_trainer(trainer.run).settings.lr_factor == 0.25


def test_restoring_a_snapshot_replays_bit_for_bit(make_trainer: MakeTrainer) -> None:
    """Also the second time: what is trained after a restore must not leak into the snapshot."""
    kept: list[Snapshot] = []
    returns: list[int] = []

    def go_back(control: TrainerControl) -> None:
        if len(returns) < 2:
            returns.append(1)
            control.request(Rollback(kept[0], skip_data=False), reason="test")

    def keep(control: TrainerControl) -> None:
        if not kept:
            kept.append(control.snapshot())

    recorder = Recorder()
    trainer = make_trainer(
        "training.max_steps=6",
        "training.optimizer.type=muon",
        "model.dropout=0.1",
        "training.checkpoint={every_steps: 1, keep: 9}",
        callbacks=[recorder],
        controllers=[At(step2=keep, step5=go_back)],
    )
    trainer.fit()
    steps = [report.step for report in recorder.steps]
    assert steps == [1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6]
    losses = [report.loss for report in recorder.steps]
    assert losses[2:5] == losses[5:8] == losses[8:11]
    assert all(line["tokens_per_sec"] > 0 for line in records(trainer.run) if "lr" in line)
    assert trainer.run.steps() == [1, 2, 3, 4, 5, 6]


def test_going_back_leaves_no_checkpoint_of_the_abandoned_history(
    make_trainer: MakeTrainer,
) -> None:
    kept: list[Snapshot] = []

    def go_back_and_stop(control: TrainerControl) -> None:
        control.request(Rollback(kept[0], skip_data=False), reason="test")
        control.request(Stop(), reason="test")

    trainer = make_trainer(
        "training.max_steps=6",
        "training.checkpoint={every_steps: 1, keep: 9}",
        controllers=[At(step2=lambda c: kept.append(c.snapshot()), step4=go_back_and_stop)],
    )
    trainer.fit()
    assert trainer.run.steps() == [1, 2]
    assert trainer.run.checkpoint("last").name == "step_00000002"
    lines = [json.loads(line) for line in trainer.run.decisions.read_text().splitlines()]
    where = [(line["action"], line["step"], line["before"], line["after"]) for line in lines]
    assert where[0] == ("rollback", 2, 4, 2)  # a resume at step 2 keeps the record


def test_mixture_weights_change_what_comes(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(
        "training.max_steps=4",
        "data.train=[{type: dummy, name: a, weight: 1}, {type: dummy, name: b, seed: 3}]",
        controllers=[At(step2=asks(SetMixtureWeights([1.0, 1e-9])))],
    )
    sources: list[int] = []
    original = trainer.loader.next_batch

    def spy() -> Any:
        batch = original()
        sources.extend(batch.source_ids[:, 0].tolist())
        return batch

    trainer.loader.next_batch = spy  # type: ignore[method-assign]
    trainer.fit()
    assert sorted(sources[:8]) == [0] * 4 + [1] * 4
    assert sources[8:].count(0) >= 7  # a share holds to within one sample


def test_checkpoints_come_by_the_clock_too(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(
        "training.max_steps=4", "training.checkpoint={every_minutes: 1.0e-9, keep: 9}"
    )
    trainer.fit()
    assert trainer.run.steps() == [1, 2, 3, 4]
    rare = make_trainer(
        "training.max_steps=4", "training.checkpoint={every_minutes: 1000, keep: 9}"
    )
    rare.fit()
    assert rare.run.steps() == [4]


def test_checkpoint_now_and_stop(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(
        "training.max_steps=9",
        "training.sample.prompts=['the ']",
        controllers=[
            At(
                step2=asks(SaveCheckpoint()),
                step4=asks(Stop()),
            )
        ],
    )
    ending = trainer.fit()
    assert (ending.name, ending.reason) == ("stopped", "test")
    assert trainer.run.steps() == [2, 4]
    assert not (trainer.run.path / "samples.jsonl").exists()  # samples are for the end of a run


def test_weights_are_averaged_where_held_out_text_is_the_better_for_it(
    make_trainer: MakeTrainer,
) -> None:
    """A high, constant rate leaves noise in the weights, which their mean has less of."""
    kept: list[Snapshot] = []
    weights: list[dict[str, torch.Tensor]] = []

    def keep(control: TrainerControl) -> None:
        kept.append(control.snapshot())
        weights.append({n: p.detach().clone() for n, p in trainer.model.named_parameters()})

    def average(control: TrainerControl) -> None:
        weights.append({n: p.detach().clone() for n, p in trainer.model.named_parameters()})
        control.request(AverageSnapshots(kept), reason="test")
        control.request(Stop(), reason="test")

    recorder = Recorder()
    trainer = make_trainer(
        "training.max_steps=200",
        "training.optimizer={type: adamw, lr: 0.02}",
        "training.schedule={type: wsd, warmup: 5, decay: 0}",
        "training.eval.max_tokens=2048",
        callbacks=[recorder],
        controllers=[At(step140=keep, step160=keep, step180=average)],
    )
    trainer.fit()
    [change] = [one for one in recorder.changes if one.setting == "average_snapshots"]
    assert change.after < change.before
    assert trainer.score().loss == pytest.approx(change.after, rel=1e-6)
    for name, parameter in trainer.model.named_parameters():
        mean = torch.stack([one[name].double() for one in weights]).mean(0)
        assert torch.allclose(parameter.double(), mean, atol=1e-6)


def test_weights_are_left_alone_where_their_mean_is_worse(make_trainer: MakeTrainer) -> None:
    kept: list[Snapshot] = []
    recorder = Recorder()
    trainer = make_trainer(
        "training.max_steps=60",
        callbacks=[recorder],
        controllers=[
            At(
                step1=lambda control: kept.append(control.snapshot()),
                step59=lambda control: control.request(AverageSnapshots(kept), reason="test"),
            )
        ],
    )
    trainer.fit()
    [change] = [one for one in recorder.changes if one.setting == "average_snapshots"]
    assert change.after == change.before
    without = make_trainer("training.max_steps=60")
    without.fit()
    assert all(
        torch.equal(one, other)
        for one, other in zip(
            trainer.model.state_dict().values(), without.model.state_dict().values(), strict=True
        )
    )


def test_of_several_processes_each_applies_what_all_agreed_on() -> None:
    """A signal may reach one of them between the agreement and the boundary: it must not act."""
    first, second = (ControlQueue(lambda: 1, shared=True) for _ in range(2))
    first.request(SetClip(0.5), "asked in time")
    everyones = [*first.take_json(), *second.take_json()]
    first.request(Stop(), "too late for this boundary")
    for queue in (first, second):
        queue.agree_on(everyones)
        assert [one.change for one in queue.take()] == [SetClip(0.5)]
        assert queue.take() == []
    assert (first.num_waiting, second.num_waiting) == (1, 0)
