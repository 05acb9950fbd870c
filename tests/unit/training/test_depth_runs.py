"""Runs with depth routing: statistics, thresholds, live capacity, schedules, resuming, alarms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.stress.evidence import differences
from tests.unit.training.conftest import MakeTrainer
from tests.unit.training.observers import At, Recorder, asks, records
from tests.unit.training.test_resume_matrix import whole_and_resumed
from ultrathink import load_model, orchestrator_of, resume_trainer
from ultrathink.core.errors import ConfigError
from ultrathink.insight.logs.opening import open_log
from ultrathink.interop.export import export_run
from ultrathink.training.changes import AdjustModCapacity, Stop

MOD = ("model.mod={layers: all, capacity: 0.5}", "training.optimizer={type: adamw, lr: 0.01}")
LEARNED = {"predicted", "agreement", "precision", "recall", "threshold"}
ALWAYS = {"capacity", "selected", "score", "gate", "always", "never", "chosen_loss", "skipped_loss"}


def of_layer(row: dict[str, Any], layer: int) -> dict[str, float]:
    prefix = f"depth/{layer}/"
    return {k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix)}


def test_every_logged_step_tells_what_each_layer_did(make_trainer: MakeTrainer) -> None:
    recorder = Recorder()
    trainer = make_trainer(
        *MOD, "training.max_steps=8", "training.log_every=4", callbacks=[recorder]
    )
    trainer.fit()
    assert [one.step for one in recorder.steps if one.depth is not None] == [1, 4, 8]
    rows = [row for row in records(trainer.run) if row["split"] == "train"]
    for row in rows:
        assert 0 < row["mod_predictor"] < 0.2
        assert row["depth/flops_saved"] == pytest.approx(0.18, abs=0.15)
        for layer in (0, 1):
            found = of_layer(row, layer)
            assert set(found) == ALWAYS | LEARNED
            assert found["selected"] == pytest.approx(0.5, abs=0.05)
            assert found["capacity"] == 0.5
            mean = found["selected"] * found["chosen_loss"]
            mean += (1 - found["selected"]) * found["skipped_loss"]
            assert mean == pytest.approx(row["loss"], rel=1e-4)
            hits = found["recall"] * found["selected"]
            assert found["precision"] * found["predicted"] == pytest.approx(hits, abs=1e-4)
            both = hits + 1 - found["predicted"] - found["selected"] + hits
            assert found["agreement"] == pytest.approx(both, abs=1e-4)
    assert all(of_layer(rows[-1], layer)["threshold"] for layer in (0, 1))  # it has moved
    read = [signals.values for signals in open_log(trainer.run.path).signals()]
    shown = [values["depth/1/agreement"] for values in read if "depth/1/agreement" in values]
    assert shown == [row["depth/1/agreement"] for row in rows]
    dense = make_trainer("training.max_steps=1")
    dense.fit()
    assert not any("depth" in name for row in records(dense.run) for name in row)


@pytest.mark.parametrize("strategy", ["fixed", "random"])
def test_other_strategies_have_nothing_to_predict(make_trainer: MakeTrainer, strategy: str) -> None:
    words = (*MOD, f"model.mod.strategy={strategy}", "training.max_steps=2")
    trainer = make_trainer(*words)
    trainer.fit()
    row = records(trainer.run)[0]
    omitted = {"always", "never"} if strategy == "fixed" else set()
    assert set(of_layer(row, 1)) == ALWAYS - omitted
    assert "mod_predictor" not in row


@pytest.mark.long
def test_late_collapse_praxis_20(make_trainer: MakeTrainer) -> None:
    """After long training at a high rate the predictor still knows the choices, evaluation takes
    as many tokens as training, and it is nearly as good as the top of each sequence."""
    trainer = make_trainer(*MOD, "training.max_steps=600", "training.log_every=50")
    trainer.fit()
    rows = [row for row in records(trainer.run) if row["split"] == "train"]
    for layer in (0, 1):
        found = of_layer(rows[-1], layer)
        assert found["predicted"] == pytest.approx(0.5, abs=0.15)
        assert found["agreement"] > 0.8
        assert found["always"] + found["never"] < 0.5
        assert 0.2 < found["gate"] < 2
    held_out, model = trainer.objective.held_out, trainer.model
    assert held_out is not None
    losses = dict.fromkeys((True, False), 0.0)
    with torch.no_grad():
        for is_top_k in losses:
            model.train(is_top_k)
            for batch in held_out.batches(8, 4096):
                losses[is_top_k] += float(model(batch.input_ids, labels=batch.labels).loss)
    assert losses[False] < 1.05 * losses[True]


@torch.no_grad()
def test_thresholds_find_the_share_of_each_capacity(make_trainer: MakeTrainer) -> None:
    """From anywhere, and they are right for capacities other than that of training too."""
    trainer = make_trainer(*MOD)
    model = trainer.model
    trainer.close()
    router = model.blocks[0].depth
    assert router is not None
    router.thresholds.fill_(1e6)
    logits = 3 * torch.randn(20_000) - 5
    for _ in range(60):
        positive = (logits[:, None] >= router.thresholds).float().sum(0)
        sums = torch.stack([logits.sum(), logits.square().sum(), torch.tensor(20_000.0)])
        router.move_thresholds(torch.cat([positive, sums]))
    shares = (logits[:, None] >= router.thresholds).float().mean(0)
    torch.testing.assert_close(shares[:7], torch.arange(1, 8) / 8, rtol=0, atol=0.02)


def test_capacity_is_live_recorded_and_survives_a_resume(make_trainer: MakeTrainer) -> None:
    recorder = Recorder()
    trainer = make_trainer(
        *MOD,
        "orchestrator.mode=act",
        "training.max_steps=9",
        callbacks=[recorder],
        controllers=[At(step2=asks(AdjustModCapacity(0.27)), step4=asks(Stop()))],
    )
    trainer.fit()
    changes = [(one.step, one.setting, one.before, one.after) for one in recorder.changes]
    assert changes[0] == (2, "mod.capacity", 0.5, 0.25)
    reported = [one.depth.capacity for one in recorder.steps if one.depth is not None]
    assert reported == [0.5, 0.5, 0.25, 0.25]
    statistics = orchestrator_of(trainer).get_mod_statistics()
    assert statistics is not None
    assert statistics.capacity == 0.25
    assert statistics.figures["selected"][0] == pytest.approx(0.25, abs=0.05)
    resumed = resume_trainer(trainer.run)
    resumed.close()
    for model in (resumed.model, load_model(trainer.run.path, "last")[0]):
        assert model.depth is not None
        assert model.depth.capacity == 0.25
    with_other = resume_trainer(trainer.run, overrides=["model.mod.capacity=0.75"])
    with_other.close()
    assert with_other.model.depth is not None
    assert with_other.model.depth.capacity == 0.75


def test_capacity_of_a_dense_model_is_refused(make_trainer: MakeTrainer) -> None:
    recorder = Recorder()
    trainer = make_trainer(
        "training.max_steps=3",
        callbacks=[recorder],
        controllers=[At(step1=asks(AdjustModCapacity(0.5)))],
    )
    assert trainer.fit().name == "finished"
    assert recorder.changes == []
    [said] = [text for text in recorder.messages if "mod.capacity" in text]
    assert "this model has no depth routing; model.mod gives it some" in said


def test_a_schedule_is_followed_and_rounding_is_said_once(make_trainer: MakeTrainer) -> None:
    recorder = Recorder()
    schedule = "model.mod={layers: all, schedule: [0.75, 0.5, 0.45]}"
    trainer = make_trainer(schedule, "training.max_steps=6", callbacks=[recorder])
    trainer.fit()
    capacities = [one.depth.capacity for one in recorder.steps if one.depth is not None]
    assert capacities == [0.75, 0.75, 0.5, 0.5, 0.5, 0.5]
    said = [text for text in recorder.messages if "is rounded to" in text]
    assert [text.partition(" ")[0] for text in said] == [
        "model.mod.capacity",
        "model.mod.schedule.2",
    ]
    assert [text for text in recorder.messages if "(model.mod.schedule)" in text] == [
        "mod.capacity: 0.75 -> 0.5 (model.mod.schedule)"
    ]


@pytest.mark.parametrize("strategy", ["learned", pytest.param("random", marks=pytest.mark.long)])
def test_a_run_that_broke_off_continues_bit_for_bit(
    make_trainer: MakeTrainer, strategy: str
) -> None:
    """Thresholds, the schedule and random choices included."""
    words = (
        f"model.mod={{layers: all, strategy: {strategy}, schedule: [0.75, 0.5]}}",
        "training.optimizer={type: muon, lr: 0.01}",
        "training.checkpoint={every_steps: 2, keep: 9}",
        "training.micro_batch_size=2",
    )
    whole, resumed = whole_and_resumed(make_trainer, *words)
    assert differences(whole, resumed) == []


def test_export_of_depth_routing_is_refused(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(*MOD, "training.max_steps=1")
    trainer.fit()
    with pytest.raises(ConfigError, match=r"no family of Hugging Face has depth.*model\.mod=null"):
        export_run(str(trainer.run.path), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_starved_layer_is_reported(make_trainer: MakeTrainer) -> None:
    recorder = Recorder()
    trainer = make_trainer(
        *MOD, "training.max_steps=3", "model.mod.predictor.threshold_rate=1.0e-9"
    )
    trainer.callbacks = [*trainer.callbacks, recorder]
    trainer.start()
    router = trainer.model.blocks[1].depth
    assert router is not None
    trainer.progress.step = 199
    watch = trainer.callbacks[[type(one).__name__ for one in trainer.callbacks].index("LiveWatch")]
    for _ in range(6):
        router.thresholds.fill_(1e3)
        report = trainer.train_step()
        watch.on_step(report)
    trainer.close()
    kinds = {event.kind for event in watch.watcher.events}  # type: ignore[attr-defined]
    assert "depth_starved" in kinds
    assert any("layer 1 is starved" in text for text in recorder.messages)
    assert json.dumps(watch.state_dict())
