"""Norms by layer and the size of an update, against sums over all weights in float64."""

import math

import pytest
import torch

from tests.unit.training.conftest import MakeTrainer
from tests.unit.training.observers import Recorder, records
from ultrathink.training.norms import LayerNorms


def test_norms_of_layers_make_up_the_whole(make_trainer: MakeTrainer) -> None:
    model = make_trainer().model
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    norms = LayerNorms(model).before_update()
    assert sorted(norms) == ["grad_norm/layer_0", "grad_norm/layer_1"]
    for number, block in enumerate(model.blocks):
        expected = math.sqrt(sum(p.grad.double().square().sum().item() for p in block.parameters()))
        assert norms[f"grad_norm/layer_{number}"] == pytest.approx(expected, rel=1e-6)


def test_the_ratio_is_that_of_the_middle_layer(make_trainer: MakeTrainer) -> None:
    model = make_trainer("model.num_layers=3").model
    norms = LayerNorms(model)
    norms.before_update()
    before = [p.detach().double().clone() for p in model.blocks[1].parameters()]
    with torch.no_grad():
        for block, factor in zip(model.blocks, (2.0, 1.01, 3.0), strict=True):
            for parameter in block.parameters():
                parameter.mul_(factor)
    size = math.sqrt(sum(p.square().sum().item() for p in before))
    moved = math.sqrt(sum((0.01 * p).square().sum().item() for p in before))
    assert norms.after_update() == {"update_ratio": pytest.approx(moved / size, rel=1e-4)}
    assert norms.after_update() == {}  # the copy is gone


def test_logged_steps_tell_of_each_layer(make_trainer: MakeTrainer) -> None:
    recorder = Recorder()
    trainer = make_trainer("training.max_steps=7", "training.log_every=3", callbacks=[recorder])
    trainer.fit()
    assert [bool(report.norms) for report in recorder.steps] == [
        step in (1, 3, 6, 7) for step in range(1, 8)
    ]
    for row in (row for row in records(trainer.run) if row["split"] == "train"):
        parts = [row["grad_norm/layer_0"], row["grad_norm/layer_1"]]
        assert 0 < math.hypot(*parts) <= row["grad_norm"]
        assert 0 < row["update_ratio"] < 1
