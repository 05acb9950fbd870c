import json
from typing import Any

import pytest
import torch

from tests.unit.training.conftest import MakeTrainer
from tests.unit.training.experts import MIXTURE, NOISE
from tests.unit.training.observers import (
    At,
    Recorder,
    asks,
    assert_equal_tensors,
    goes_back,
    records,
)
from ultrathink.recipes.resume import resume_trainer
from ultrathink.training.changes import (
    AverageSnapshots,
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
    act = asks(
        SetLearningRateFactor(0.5),
        SetClip(0.1),
        SetWeightDecay(0.2),
        SetMicroBatchSize(3),
        SkipSamples(8),
    )
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
    assert {(line["step"], line["reasoning"]) for line in lines} == {(2, "test")}
    assert (trainer.loader.samples_seen, trainer.loader.samples_skipped) == (16, 8)


def test_changed_settings_survive_a_resume(make_trainer: MakeTrainer) -> None:
    act = At(step2=asks(SetLearningRateFactor(0.25), Stop()))
    trainer = make_trainer("training.max_steps=4", controllers=[act])
    trainer.fit()
    resumed = resume_trainer(trainer.run)
    assert resumed.settings.lr_factor == 0.25
    resumed.close()


@pytest.mark.parametrize("model", [("model.dropout=0.1",), (*MIXTURE, NOISE)])
def test_restoring_a_snapshot_replays_bit_for_bit(
    make_trainer: MakeTrainer, model: tuple[str, ...]
) -> None:
    """Also the second time: what is trained after a restore must not leak into the snapshot."""
    recorder = Recorder()
    trainer = make_trainer(
        *model,
        "training.max_steps=6",
        "training.optimizer.type=muon",
        "training.checkpoint={every_steps: 1, keep: 9}",
        callbacks=[recorder],
        controllers=[
            goes_back(kept=2, at=5, times=2),
            At(step4=asks(SetLearningRateFactor(0.5))),
        ],
    )
    trainer.fit()
    steps = [report.step for report in recorder.steps]
    assert steps == [1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6]
    losses = [(report.loss, report.lr, report.aux_losses) for report in recorder.steps]
    assert losses[2:5] == losses[5:8] == losses[8:11]
    assert all(line["tokens_per_sec"] > 0 for line in records(trainer.run) if "lr" in line)
    assert trainer.run.steps() == [1, 2, 3, 4, 5, 6]


def test_going_back_leaves_no_checkpoint_of_the_abandoned_history(
    make_trainer: MakeTrainer,
) -> None:
    trainer = make_trainer(
        "training.max_steps=6",
        "training.checkpoint={every_steps: 1, keep: 9}",
        controllers=[goes_back(kept=2, at=4), At(step4=asks(Stop()))],
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


def test_checkpoints_come_by_the_clock_too(finished: MakeTrainer) -> None:
    often = "training.checkpoint={every_minutes: 1.0e-9, keep: 9}"
    assert finished("training.max_steps=4", often).run.steps() == [1, 2, 3, 4]
    rare = "training.checkpoint={every_minutes: 1000, keep: 9}"
    assert finished("training.max_steps=4", rare).run.steps() == [4]


def test_checkpoint_now_and_stop(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(
        "training.max_steps=9",
        "training.sample.prompts=['the ']",
        controllers=[At(step2=asks(SaveCheckpoint()), step4=asks(Stop()))],
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


def test_weights_are_left_alone_where_their_mean_is_worse(
    make_trainer: MakeTrainer, finished: MakeTrainer
) -> None:
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
    without = finished("training.max_steps=60")
    assert_equal_tensors(trainer.model.state_dict(), without.model.state_dict())


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
