"""Optimizer steps of a mixture: the biases, empty slots, clipping, and cutting a batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.training.conftest import MakeTrainer
from tests.unit.training.experts import ACTIVE, GROUPS, MIXTURE, ROUTING
from ultrathink.data.batch import Batch
from ultrathink.training.stepping import StepResult
from ultrathink.training.trainer import Trainer

OPTIMIZERS = {
    "adamw": "training.optimizer={type: adamw, lr: 0.01, weight_decay: 0.3}",
    "muon": "training.optimizer={type: muon, lr: 0.01, weight_decay: 0.3}",
}
FP64 = (*MIXTURE, ROUTING, "training.precision=fp64", OPTIMIZERS["adamw"], "training.batch_size=8")


def state(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def biases(trainer: Trainer) -> list[Tensor]:
    layers = trainer.model.expert_layers().values()
    return [layer.router.selection_bias.clone() for layer in layers]


def take_steps(trainer: Trainer, count: int) -> list[StepResult]:
    trainer.model.train()
    return [
        trainer.stepper.take_step(trainer.loader.next_batch(), trainer.settings, 1.0)
        for _ in range(count)
    ]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_micro_batches_and_recomputation_change_no_step(
    make_trainer: MakeTrainer, optimizer: str
) -> None:
    """Nor the load of its experts, nor the biases that follow from it."""
    results = []
    for words in (
        ("training.micro_batch_size=8",),
        ("training.micro_batch_size=4",),
        ("training.micro_batch_size=2", "training.activation_checkpointing=selective"),
        ("training.micro_batch_size=1", "training.activation_checkpointing=full"),
    ):
        trainer = make_trainer(*FP64, OPTIMIZERS[optimizer], *words)
        results.append((take_steps(trainer, 3), state(trainer)))
    (steps, weights), *others = results
    assert all(layer.any() for result in steps for layer in result.stats["expert_dropped"])
    for steps_, weights_ in others:
        for here, there in zip(steps, steps_, strict=True):
            assert there.loss == pytest.approx(here.loss, abs=1e-9)
            assert there.grad_norm == pytest.approx(here.grad_norm, abs=1e-9)
            assert there.aux_losses == pytest.approx(here.aux_losses, abs=1e-9)
            torch.testing.assert_close(there.stats, here.stats, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(weights_, weights, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", ["none", "full"])
def test_biases_move_once_a_step_and_the_right_way(make_trainer: MakeTrainer, mode: str) -> None:
    """Whatever the number of micro-batches, and however often a block is computed."""
    words = ("training.micro_batch_size=2", f"training.activation_checkpointing={mode}")
    trainer = make_trainer(*FP64, *words)
    expected = biases(trainer)
    assert not any(bias.any() for bias in expected)
    for _ in range(2):
        [result] = take_steps(trainer, 1)
        for bias, load in zip(expected, result.stats["expert_load"], strict=True):
            for group in GROUPS:  # each is evened out by itself
                mean = load[group].mean()
                bias[group] += 0.01 * (mean - load[group]).sign()
        for bias, found in zip(expected, biases(trainer), strict=True):
            torch.testing.assert_close(found, bias, rtol=0, atol=1e-9)
        assert any(bias.any() for bias in expected)


def test_a_group_that_is_even_keeps_its_biases(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(*FP64)
    load = torch.tensor([[5.0] * 6 + [0.0] * 2 + [9.0, 6.0, 6.0]] * 2)
    trainer.model.move_selection_biases(load)
    for bias in biases(trainer):
        assert bias.tolist() == pytest.approx([0.0] * 8 + [-0.01, 0.01, 0.01])


def test_no_bias_moves_in_a_step_that_is_left_out(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(*FP64)
    take_steps(trainer, 1)
    before, losses = state(trainer), trainer.objective.sums

    def poisoned(*inputs: Any) -> Any:
        sums = losses(*inputs)
        return sums._replace(loss=sums.loss * math.nan)

    trainer.objective.sums = poisoned
    [result] = take_steps(trainer, 1)
    assert result.skipped
    assert all(torch.equal(value, before[name]) for name, value in state(trainer).items())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_empty_slots_stay_empty(make_trainer: MakeTrainer, optimizer: str) -> None:
    trainer = make_trainer(*FP64, OPTIMIZERS[optimizer])
    empty = ~torch.tensor(ACTIVE)
    for result in take_steps(trainer, 4):
        for name in ("load", "dropped", "probability"):
            assert not result.stats[f"expert_{name}"][:, empty].any()
    for layer in trainer.model.expert_layers().values():
        assert layer.router.active.tolist() == ACTIVE
        assert not layer.router.selection_bias[empty].any()
        for weight in (layer.router.weight, *layer.experts.parameters()):
            assert not weight[empty].any()
            assert all(part.any() for part in weight[~empty])
            moments = next(o.state[weight] for o in trainer.stepper.optimizers if weight in o.state)
            assert all(not m[empty].any() for m in moments.values() if m.shape == weight.shape)


def test_clipping_counts_each_expert_once(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(*FP64, "training.clip=0.05")
    seen: list[Tensor] = []
    optimizer = trainer.stepper.optimizers[0]
    step = optimizer.step

    def watched(*args: Any, **options: Any) -> Any:
        seen.append(flat_gradient(trainer))
        return step(*args, **options)

    optimizer.step = watched  # type: ignore[method-assign]
    batch = trainer.loader.next_batch()
    expected = gradient_of(trainer, batch)
    result = trainer.stepper.take_step(batch, trainer.settings, 1.0)
    assert result.grad_norm == pytest.approx(expected.norm().item(), rel=1e-12)
    assert result.grad_norm > 0.05
    scaled = expected * 0.05 / expected.norm()
    torch.testing.assert_close(seen[0], scaled, rtol=1e-4, atol=1e-9)


def flat_gradient(trainer: Trainer) -> Tensor:
    gradients = [parameter.grad for parameter in trainer.model.parameters()]
    return torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


def gradient_of(trainer: Trainer, batch: Batch) -> Tensor:
    """The gradient of the mean over trained tokens of all losses, as one vector."""
    output = trainer.model(
        batch.input_ids, batch.labels, positions=batch.positions, document_ids=batch.document_ids
    )
    total = output.loss + sum(output.aux_losses.values())
    gradients = torch.autograd.grad(total / output.num_tokens, list(trainer.model.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])
