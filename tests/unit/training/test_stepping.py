import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.unit.training.conftest import MakeTrainer
from tests.unit.training.weighted import weights_of
from ultrathink.data.batch import IGNORED, Batch
from ultrathink.training.trainer import Trainer

FP64 = ("training.precision=fp64", "training.optimizer={type: adamw, lr: 0.01}")


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def uneven(batch: Batch) -> Batch:
    """The batch with ever more of each row's labels left out, so that rows weigh differently."""
    labels = batch.labels.clone()
    for row in range(labels.shape[0]):
        labels[row, : 9 * row] = IGNORED
    return replace(batch, labels=labels)


@pytest.mark.parametrize("micro", [1, 2])
def test_accumulation_equals_one_large_batch(make_trainer: MakeTrainer, micro: int) -> None:
    """Gradients are weighted by tokens: rows with fewer labels count for less."""
    results = []
    for size in (4, micro):
        trainer = make_trainer(*FP64, f"training.micro_batch_size={size}")
        batch = uneven(trainer.loader.next_batch())
        result = trainer.stepper.take_step(batch, trainer.settings, 1.0)
        results.append((result.loss, result.grad_norm, weights(trainer)))
    (loss, norm, one), (loss_, norm_, many) = results
    assert loss_ == pytest.approx(loss, rel=1e-12)
    assert norm_ == pytest.approx(norm, rel=1e-10)
    assert all(torch.allclose(one[name], many[name], rtol=0, atol=1e-12) for name in one)


def test_a_batch_with_nothing_to_train_is_skipped(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(*FP64)
    batch = trainer.loader.next_batch()
    before = weights(trainer)
    for empty in (
        replace(batch, labels=torch.full_like(batch.labels, IGNORED)),
        replace(batch, loss_weights=torch.zeros(batch.labels.shape)),
    ):
        result = trainer.stepper.take_step(empty, trainer.settings, 1.0)
        assert result.skipped
        assert result.loss == 0.0
        assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_skipped_step_is_as_if_it_had_not_been(make_trainer: MakeTrainer, optimizer: str) -> None:
    """Weights, moments and bias correction after bad steps equal those of a run without them."""
    results = []
    for poison in (False, True):
        trainer = make_trainer(
            "training.precision=fp64", f"training.optimizer={{type: {optimizer}, lr: 0.01}}"
        )
        losses = trainer.objective.sums
        batches = [trainer.loader.next_batch() for _ in range(3)]
        for number, batch in enumerate(batches):
            if poison and number != 1:
                trainer.objective.sums = _poisoned(losses)
                assert trainer.stepper.take_step(batch, trainer.settings, 1.0).skipped
                trainer.objective.sums = losses
            trainer.stepper.take_step(batch, trainer.settings, 1.0)
        results.append(weights(trainer))
    clean, survived = results
    assert all(torch.equal(clean[name], survived[name]) for name in clean)


def _poisoned(losses: Any) -> Any:
    def poisoned(*inputs: Any) -> Any:
        sums = losses(*inputs)
        return sums._replace(loss=sums.loss * math.nan)

    return poisoned


def test_weight_decay_and_rate_reach_the_groups(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(*FP64)
    trainer.settings.weight_decay = 0.25
    trainer.stepper.take_step(trainer.loader.next_batch(), trainer.settings, 0.1)
    matrices, vectors = trainer.stepper.optimizers[0].param_groups
    assert matrices["lr"] == vectors["lr"] == pytest.approx(0.01 * 0.1)
    assert matrices["weight_decay"] == 0.25
    assert vectors["weight_decay"] == 0.0
    assert {p.ndim for p in vectors["params"]} == {1}


@pytest.mark.parametrize("micro", [4, 1])
@pytest.mark.parametrize("scale", [None, 1.0, 2**-12])
def test_losses_are_means_over_all_trained_targets_by_their_weights(
    make_trainer: MakeTrainer, micro: int, scale: float | None
) -> None:
    """However little all weights come to; other terms than the loss are not weighted."""
    trainer = make_trainer(
        *FP64, "model.z_loss=0.1", "training.clip=null", f"training.micro_batch_size={micro}"
    )
    batch = uneven(trainer.loader.next_batch())
    weights = torch.ones(batch.labels.shape, dtype=torch.float64)
    if scale is not None:
        batch = replace(batch, loss_weights=scale * weights_of(batch))
        weights = batch.loss_weights.double()  # type: ignore[union-attr]
    logits = trainer.model(
        batch.input_ids, positions=batch.positions, document_ids=batch.document_ids
    ).logits
    counted = (batch.labels != IGNORED) & (weights > 0)
    each = -logits.log_softmax(-1).gather(-1, batch.labels.clamp(min=0)[..., None])[..., 0]
    loss = (each * weights)[counted].sum() / weights[counted].sum()
    z_loss = 0.1 * logits.logsumexp(-1)[counted].square().mean()
    gradients = torch.autograd.grad(loss + z_loss, list(trainer.model.parameters()))
    result = trainer.stepper.take_step(batch, trainer.settings, 1.0)
    assert result.num_tokens == int(counted.sum())
    assert result.loss == pytest.approx(loss.item(), rel=1e-10)
    assert result.aux_losses == {"z_loss": pytest.approx(z_loss.item(), rel=1e-10)}
    norm = torch.nn.utils.get_total_norm(gradients).item()
    assert result.grad_norm == pytest.approx(norm, rel=1e-9)
