"""Runs that train several modules, against plain loops of torch; what a run keeps of each."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from tests.unit.training import several_modules
from tests.unit.training.conftest import MakeTrainer
from tests.unit.training.limited_memory import LimitedMemory
from tests.unit.training.observers import At
from tests.unit.training.several_modules import PEER_LR, VALUE_DECAY, VALUE_LR
from ultrathink.checkpoint.format import load_checkpoint
from ultrathink.core.errors import CheckpointError
from ultrathink.data.batch import IGNORED, Batch
from ultrathink.recipes.resume import resume_trainer
from ultrathink.runs.loading import load_model
from ultrathink.training import compiling
from ultrathink.training.changes import AverageSnapshots, Rollback
from ultrathink.training.control import TrainerControl
from ultrathink.training.silent_changes import KeepState
from ultrathink.training.snapshots import Snapshot
from ultrathink.training.trainer import Trainer
from ultrathink.training.validation import Scores

FP64 = "training.precision=fp64"
CRITIC, MUTUAL = "training.objective=critic", "training.objective=mutual"
BOTH = pytest.mark.parametrize("objective", [CRITIC, MUTUAL])
OTHER = {CRITIC: "value", MUTUAL: "peer"}


@pytest.fixture(autouse=True, scope="module")
def _registered() -> Iterator[None]:
    with several_modules.registered():
        yield


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """All weights of a run, and what its optimizers remember of each."""
    state: Any = copy.deepcopy(trainer.state_dict())
    found: dict[str, Tensor] = {}
    for kind in ("model", "optimizer", *state["modules"]):
        values = state["modules"][kind] if kind in state["modules"] else state[kind]
        for name, value in values.items():
            inner = value if isinstance(value, dict) else {"": value}
            found |= {f"{kind} {name} {key}": one for key, one in inner.items()}
    return found


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name, value in one.items() if not torch.equal(value, other[name])] == []


def plain_losses(modules: dict[str, Any], batch: Batch, objective: str) -> dict[str, Tensor]:
    """What a step minimizes and reports, from the logits of all positions."""
    trained, targets = batch.labels != IGNORED, batch.labels.clamp(min=0)
    where = {"positions": batch.positions, "document_ids": batch.document_ids}
    kept: list[Tensor] = []
    main = modules["model"]
    hook = main.norm.register_forward_hook(lambda *inside: kept.append(inside[2]))
    ours = main(batch.input_ids, **where).logits.log_softmax(-1)
    hook.remove()
    each = -ours.gather(-1, targets[..., None])[..., 0]
    if objective == CRITIC:
        judged = modules["judge"](batch.input_ids, **where)
        found = {"value": modules["value"](kept[0]), "judge": judged}
        errors = {n: (v.view(each.shape) - each.detach()).square() for n, v in found.items()}
        return {name: value[trained].mean() for name, value in {"loss": each, **errors}.items()}
    theirs = modules["peer"](batch.input_ids, **where).logits.log_softmax(-1)
    peer = -theirs.gather(-1, targets[..., None])[..., 0]
    terms = {
        "loss": each,
        "peer": peer,
        "kl": _kl(theirs.detach(), ours),
        "peer_kl": _kl(ours.detach(), theirs),
    }
    return {name: value[trained].mean() for name, value in terms.items()}


def _kl(reference: Tensor, ours: Tensor) -> Tensor:
    return F.kl_div(ours, reference, log_target=True, reduction="none").sum(-1)


def plain_optimizer(modules: dict[str, nn.Module], peak: float) -> torch.optim.Optimizer:
    """AdamW over all modules, each matrix decayed, each module at its own rate."""
    factors = {"value": (VALUE_LR, VALUE_DECAY), "peer": (PEER_LR, 0.1)}
    groups = []
    for name, module in modules.items():
        factor, decay = factors.get(name, (1.0, 0.1))
        for is_matrix in (True, False):
            chosen = [p for p in module.parameters() if (p.ndim >= 2) == is_matrix]
            own = {"peak": factor * peak, "weight_decay": decay if is_matrix else 0.0}
            groups.append({"params": chosen, **own})
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), eps=1e-8, foreach=False)


@BOTH
@pytest.mark.parametrize("micro", [4, 1])
def test_three_steps_are_those_of_a_plain_loop(
    make_trainer: MakeTrainer, objective: str, micro: int
) -> None:
    words = (FP64, objective, "training.clip=0.3", f"training.micro_batch_size={micro}")
    trainer = make_trainer(*words, "training.optimizer={type: adamw, lr: 0.01}")
    modules = copy.deepcopy(trainer.objective.models.modules)
    optimizer = plain_optimizer(modules, 0.01)
    for factor in (1.0, 0.6, 0.2):
        batch = trainer.loader.next_batch()
        batch.labels[0, 5:] = IGNORED  # rows weigh differently
        expected = plain_losses(modules, batch, objective)
        optimizer.zero_grad()
        torch.stack(list(expected.values())).sum().backward()
        parameters = [p for module in modules.values() for p in module.parameters()]
        norm = torch.nn.utils.clip_grad_norm_(parameters, 0.3)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        optimizer.step()
        result = trainer.stepper.take_step(batch, trainer.settings, factor)
        found = {"loss": result.loss, **result.aux_losses}
        assert found == {n: pytest.approx(v.item(), rel=1e-9) for n, v in expected.items()}
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-9)
        assert norm > 0.3
    for name, module in trainer.objective.models.modules.items():
        for own, value in module.state_dict().items():
            torch.testing.assert_close(value, modules[name].state_dict()[own], rtol=0, atol=1e-9)


@BOTH
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adamw on the host"])
def test_a_resumed_run_and_one_that_went_back_are_the_undisturbed_one(
    make_trainer: MakeTrainer, objective: str, optimizer: str
) -> None:
    words = (
        objective,
        f"training.optimizer={{type: {optimizer.split()[0]}, lr: 0.01}}",
        f"parallel.offload={'optimizer' if 'host' in optimizer else 'none'}",
        "training.checkpoint={every_steps: 3, keep: 9}",
        "training.max_steps=5",
        "model.dropout=0.1",
    )
    straight = make_trainer(*words, "run.name=straight")
    straight.fit()
    expected = everything(straight)
    assert any(name.startswith(f"optimizer {OTHER[objective]}/") for name in expected)
    resumed = resume_trainer(straight.run, "3")
    resumed.fit()
    assert_same(everything(resumed), expected)

    kept: list[Snapshot] = []

    def go_back(control: TrainerControl) -> None:
        if len(kept) == 1:
            kept.append(kept[0])
            control.request(Rollback(kept[0], skip_data=False), reason="test")

    steering = At(step2=lambda control: kept or kept.append(control.snapshot()), step4=go_back)
    returned = make_trainer(*words, controllers=[steering])
    returned.fit()
    assert len(kept) == 2
    assert_same(everything(returned), expected)


@BOTH
def test_a_checkpoint_holds_all_and_its_model_is_the_main_one(
    make_trainer: MakeTrainer, objective: str
) -> None:
    trainer = make_trainer(objective, "training.max_steps=2")
    drawn = torch.get_rng_state()
    modules = trainer.objective.models.modules
    first = copy.deepcopy(modules)
    trainer.fit()
    state: Any = load_checkpoint(trainer.run.checkpoint("last"))
    assert state["modules"].keys() == trainer.objective.models.beside.keys()
    for name, module in modules.items():
        kept = state["model"] if name == "model" else state["modules"][name]
        assert_same(kept, dict(module.state_dict()))
        assert not torch.equal(*(next(one.parameters()) for one in (first[name], module)))
    model, _ = load_model(trainer.run.path, "last")
    assert_same(dict(model.state_dict()), dict(trainer.model.state_dict()))
    plain = make_trainer("training.max_steps=2")  # the main one begins as in any other run
    assert torch.equal(torch.get_rng_state(), drawn)
    assert_same(dict(plain.model.state_dict()), dict(first["model"].state_dict()))


@BOTH
def test_memory_that_runs_out_and_steps_left_out_leave_no_module_behind(
    make_trainer: MakeTrainer, objective: str
) -> None:
    found = []
    for disturbed in (False, True):
        trainer = make_trainer(FP64, objective, "training.micro_batch_size=4")
        batch = trainer.loader.next_batch()
        if disturbed:
            _disturb(trainer, batch)
        trainer.stepper.take_step(batch, trainer.settings, 1.0)
        found.append(everything(trainer))
        assert trainer.settings.micro_batch_size == (1 if disturbed and objective == CRITIC else 4)
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=1e-12)


def _disturb(trainer: Trainer, batch: Batch) -> None:
    """A step that is not finite, and where passes are one, passes that do not fit."""
    trainer.stepper.allocate_state()
    before, losses = everything(trainer), trainer.objective.losses

    def poisoned(batch: Batch) -> Any:
        found = losses(batch)
        name = list(found.terms)[-1]
        found.terms[name] = found.terms[name]._replace(sum=found.terms[name].sum * math.nan)
        return found

    trainer.objective.losses = poisoned  # type: ignore[method-assign]
    assert trainer.stepper.take_step(batch, trainer.settings, 1.0).skipped
    trainer.objective.losses = losses  # type: ignore[method-assign]
    assert_same(everything(trainer), before)
    if isinstance(trainer.objective, several_modules.Critic):
        LimitedMemory(trainer, fits=1, where="backward")


@pytest.mark.parametrize("helps", [True, False])
def test_snapshots_are_averaged_module_by_module(make_trainer: MakeTrainer, helps: bool) -> None:
    trainer = make_trainer(MUTUAL)
    before = everything(trainer)
    trainer.snapshots.keep(1, trainer.state.copy(), in_checkpoints=False)
    trainer.start()
    trainer.train_step()
    after = everything(trainer)
    scores = [Scores(2.0, 1), Scores(1.0 if helps else 3.0, 1)]
    parts = replace(trainer.parts, held_out=lambda: scores.pop(0))
    AverageSnapshots([Snapshot(0, 1)]).apply(parts)
    for name, value in everything(trainer).items():
        if name.startswith("optimizer "):
            continue
        mean = (
            (before[name] + after[name]) / 2 if helps and value.is_floating_point() else after[name]
        )
        torch.testing.assert_close(value, mean)
    KeepState(1, 1, snapshot_key=1, weights_only=True).apply(parts)
    [kept] = trainer.run.kept_states()
    state: Any = load_checkpoint(trainer.run.states / kept)
    assert state.keys() == {"model", "modules", "progress"}
    trainer.close()


def test_a_module_has_its_own_precision_and_the_runs_checkpointing(
    make_trainer: MakeTrainer,
) -> None:
    results = []
    for precision, dtype in (("auto", torch.float64), ("fp32", torch.float32)):
        words = f"training.objective={{type: mutual, precision: {precision}}}"
        full = "training.activation_checkpointing=full"
        trainer = make_trainer(FP64, words, full, "training.clip=0.01")
        models: Any = trainer.objective.models.modules.values()
        assert {model.activation_checkpointing for model in models} == {"full"}
        trainer.objective.models.set_activation_checkpointing("none")
        assert {model.activation_checkpointing for model in models} == {"none"}
        peer = trainer.objective.models.modules["peer"]
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float64}
        assert {p.dtype for p in peer.parameters()} == {dtype}
        results.append(trainer.stepper.take_step(trainer.loader.next_batch(), trainer.settings, 1))
    assert results[1].grad_norm == pytest.approx(results[0].grad_norm, rel=1e-5)
    assert results[1].grad_norm != results[0].grad_norm


def test_another_objective_takes_the_model_along_and_needs_its_own_modules(
    make_trainer: MakeTrainer,
) -> None:
    critic = make_trainer(CRITIC, "training.max_steps=2", "run.name=critic")
    critic.fit()
    on = ["training.objective=pretrain", "training.max_steps=3"]
    plain = resume_trainer(critic.run, overrides=on)
    plain.fit()
    assert "modules" not in plain.state_dict()
    with pytest.raises(CheckpointError) as caught:
        resume_trainer(plain.run, overrides=["training.objective=critic", "training.max_steps=4"])
    assert str(caught.value) == (
        "training.objective trains 'value' beside the model, but the checkpoint has no 'value'; "
        "resume with the objective and options of the checkpoint, or start a new run with its "
        "weights: training.init_from=RUN."
    )


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler uses what is going
def test_compiled_passes_of_two_models_are_the_eager_ones(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has graphs of its own: of its pass with the other's states, and the main one without."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = partial(torch.compile, fullgraph=True, dynamic=False, backend=counter)
    monkeypatch.setattr(compiling, "compile_function", compiled)
    torch._dynamo.reset()
    found = []
    for is_compiled in ("false", "true"):
        trainer = make_trainer(FP64, MUTUAL, f"training.compile={is_compiled}")
        for _ in range(2):
            batch = trainer.loader.next_batch()
            result = trainer.stepper.take_step(batch, trainer.settings, 1.0)
        found.append({"loss": result.loss, "norm": result.grad_norm, **result.aux_losses})
    torch._dynamo.reset()
    assert counter.frame_count == 3
    assert found[1] == pytest.approx(found[0], rel=1e-9)
