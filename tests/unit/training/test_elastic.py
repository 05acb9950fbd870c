"""Training every path: against whole logits of each, what is sampled, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import LlamaForCausalLM

from tests.unit.training.conftest import MakeTrainer
from tests.unit.training.observers import assert_equal_tensors
from tests.unit.training.weighted import weights_of
from ultrathink.core.errors import ConfigError, UltrathinkError
from ultrathink.data.batch import IGNORED
from ultrathink.interop.export import export_run
from ultrathink.model.compute_path import ComputePath
from ultrathink.model.thinning import Thinning, layer_dropout
from ultrathink.recipes.resume import resume_trainer
from ultrathink.training.objectives.elastic import Elastic, ElasticBatch
from ultrathink.training.trainer import Trainer

FP64 = "training.precision=fp64"
SHAPE = (
    "model.num_layers=4",
    "model.init={std: 0.2}",
    "model.moe={groups: [{name: a, num_experts: 4, top_k: 2}, {name: b, num_experts: 3, top_k: 1}],"
    " shared_size: 16, intermediate_size: 16, routing: {warmup_steps: 0}}",
    "training.batch_size=8",
)
EXITS = "model.exits={layers: [0, 2]}"
OWN_NORMS = "model.exits={layers: [0, 2], own_norms: true}"


def elastic(exits: str = "{ramp_steps: 0}", sub_paths: str = "{ramp_steps: 0}", **more: Any) -> str:
    given = "".join(f", {name}: {value}" for name, value in more.items())
    return f"training.objective={{type: elastic, exits: {exits}, sub_paths: {sub_paths}{given}}}"


def prepared(trainer: Trainer, step: int = 1) -> ElasticBatch:
    objective = trainer.objective
    assert isinstance(objective, Elastic)
    objective.before_step(step)
    batch = trainer.loader.next_batch()
    batch.labels[0, 5:] = IGNORED  # rows weigh differently
    return objective.prepare(batch, step)


def expected(trainer: Trainer, batch: ElasticBatch, weights: Tensor | None = None) -> Any:
    """Loss, exit and sub-path of a batch from the logits of all its positions."""
    objective, model = trainer.objective, trainer.model
    assert isinstance(objective, Elastic)
    inside = {"positions": batch.positions, "document_ids": batch.document_ids}
    trained = (batch.labels != IGNORED).double()
    trained = trained if weights is None else trained * weights

    def logs(path: ComputePath | None = None, **options: Any) -> Tensor:
        return model(batch.input_ids, path=path, **inside, **options).logits.log_softmax(-1)

    def of_labels(each: Tensor) -> Tensor:
        return -each.gather(-1, batch.labels.clamp(min=0)[..., None])[..., 0]

    def mixed(each: Tensor) -> Tensor:
        taught = -(whole.detach().exp() * each).sum(-1)
        share = objective.config.distill
        return (1 - share) * of_labels(each) + share * taught

    whole = logs()
    result = [(of_labels(whole) * trained).sum() / trained.sum()]
    if batch.exit_tokens is not None:
        mine = torch.zeros_like(trained).scatter_(1, batch.exit_tokens, 1.0) * trained
        each = mixed(logs(ComputePath(tuple(range(batch.exit_layer + 1)))))
        result.append((each * mine).sum() / mine.sum())
    if batch.runs_again is not None:
        mine = batch.runs_again[:, None] * trained
        thinning = None if batch.keep is None else Thinning(batch.keep, batch.width)
        each = mixed(logs(objective.paths[batch.sub_path], thinning=thinning))
        result.append((each * mine).sum() / mine.sum())
    return result


@pytest.mark.parametrize(
    ("words", "micro", "step", "is_weighed"),
    [
        ((EXITS, elastic()), 8, 2, False),
        ((OWN_NORMS, elastic()), 2, 4, True),
        ((EXITS, elastic(distill=0.0)), 1, 1, True),
        ((elastic(sub_paths="null"),), 4, 1, False),
        ((elastic(exits="null", distill=1.0),), 1, 3, False),
        (
            (elastic(sub_paths="{rows: 0.375, layer_dropout: 0.9, sample_top_k: true}"),),
            2,
            5,
            False,
        ),
    ],
)
def test_a_step_is_that_of_whole_logits(
    make_trainer: MakeTrainer, words: tuple[str, ...], micro: int, step: int, is_weighed: bool
) -> None:
    trainer = make_trainer(FP64, *SHAPE, *words, f"training.micro_batch_size={micro}")
    batch = prepared(trainer, step)
    weights = weights_of(batch) if is_weighed else None
    batch = replace(batch, loss_weights=weights)
    for name, parameter in trainer.model.exit_norms.named_parameters():
        parameter.data.add_(0.1 * float(name[0]) + 0.1)
    objective = trainer.objective
    assert isinstance(objective, Elastic)
    loss, *others = expected(trainer, batch, weights)
    factors = []
    if batch.exit_tokens is not None:
        factors.append((objective.weights["exit"] * ((batch.exit_layer + 1) / 4)).item())
    if batch.runs_again is not None:
        factors.append(objective.weights["sub_path"].item())
    assert all(factor > 0.001 for factor in factors)
    total = loss + sum(f * each for f, each in zip(factors, others, strict=True))
    for parameter in trainer.model.parameters():
        parameter.grad = None
    # The balance losses are those of one pass over the whole model.
    inside = {"positions": batch.positions, "document_ids": batch.document_ids}
    aux = trainer.model(batch.input_ids, batch.targets, **inside).aux_losses
    (total + sum(aux.values()) / batch.num_target_tokens).backward()
    gradients = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    norm = torch.nn.utils.get_total_norm(list(gradients.values())).item()
    for parameter in trainer.model.parameters():
        parameter.grad = None
    result = trainer.stepper.take_step(batch, trainer.settings, 1.0)
    assert result.loss == pytest.approx(loss.item(), rel=1e-10)
    names = [n for n in ("exit", "sub_path") if n in result.aux_losses]
    assert len(names) == len(others)
    for name, value in zip(names, others, strict=True):
        assert result.aux_losses[name] == pytest.approx(value.item(), rel=1e-9), name
    assert result.grad_norm == pytest.approx(norm, rel=1e-9)


def test_without_weight_the_whole_model_learns_as_in_pretraining(
    make_trainer: MakeTrainer,
) -> None:
    """The reported loss, the balance of experts and the gradient are the whole model's."""
    nothing = elastic("{weight: 0}", "{weight: 0}")
    results, models = [], []
    for words in ((), (nothing,)):
        trainer = make_trainer(FP64, *SHAPE, *words, "training.max_steps=3")
        batch = trainer.objective.prepare(trainer.loader.next_batch(), 1)
        results.append(trainer.stepper.take_step(batch, trainer.settings, 1.0))
        models.append(trainer.model.state_dict())
    plain, other = results
    assert other.loss == plain.loss
    assert other.grad_norm == pytest.approx(plain.grad_norm, rel=1e-12)
    assert_equal_tensors(other.stats, plain.stats)
    biases = [name for name in models[0] if name.endswith("selection_bias")]
    assert biases
    for name in biases:
        assert torch.equal(models[0][name], models[1][name])


@settings(max_examples=60, deadline=None)
@given(numerator=st.integers(1, 16), start=st.integers(0, 10**6), micro=st.integers(1, 24))
def test_no_micro_batch_runs_more_again_than_its_share(
    numerator: int, start: int, micro: int
) -> None:
    """Evenly spaced sequences fit into as many rows as every micro-batch of that size has."""
    chosen = [sample * numerator % 16 < numerator for sample in range(start, start + micro)]
    assert sum(chosen) <= -(-micro * numerator // 16)
    assert sum(chosen) >= micro * numerator // 16


def test_what_is_sampled_follows_seed_step_and_sample_alone(make_trainer: MakeTrainer) -> None:
    words = elastic(sub_paths="{layer_dropout: 0.5, sample_top_k: true}")
    trainer = make_trainer(*SHAPE, EXITS, words)
    objective, batch = trainer.objective, trainer.loader.next_batch()
    assert isinstance(objective, Elastic)
    whole = objective.prepare(batch, 7)
    parts = [objective.prepare(part, 7) for part in batch.split(3)]
    torch.rand(3)  # other random numbers change nothing
    for name, value in whole.tensors().items():
        assert torch.equal(value, torch.cat([part.tensors()[name] for part in parts])), name
    assert {part.sub_path for part in parts} == {whole.sub_path}
    later = objective.prepare(batch, 8)
    assert not torch.equal(later.exit_tokens, whole.exit_tokens)
    assert later.exit_layer != whole.exit_layer
    assert whole.exit_tokens is not None
    assert whole.exit_tokens.shape == (8, 16)
    assert all(len(set(row.tolist())) == 16 for row in whole.exit_tokens)
    assert list(objective.paths) == ["fast", "standard", "ultra_deep"]
    assert objective.scored_paths == ("expert", "fast", "standard", "ultra_deep")


def test_layers_are_skipped_as_often_as_said_and_the_first_never(
    make_trainer: MakeTrainer,
) -> None:
    assert [layer_dropout(layer, 4, 0.2) for layer in (0, 3)] == pytest.approx([0.0, 0.2])
    words = elastic(sub_paths="{layer_dropout: 0.5}")
    trainer = make_trainer(*SHAPE, words, "training.batch_size=1000")
    batch = trainer.objective.prepare(trainer.loader.next_batch(), 1)
    assert isinstance(batch, ElasticBatch)
    assert batch.keep is not None
    skipped = 1 - batch.keep.float().mean(0)
    limits = [layer_dropout(layer, 4, 0.5) for layer in range(4)]
    assert skipped.tolist() == pytest.approx(limits, abs=0.05)


@torch.no_grad()
def test_a_skipped_layer_is_as_if_it_were_not_there(make_trainer: MakeTrainer) -> None:
    model = make_trainer(FP64, *SHAPE).model.train()
    ids = torch.randint(0, 256, (2, 20))
    keep = torch.tensor([[True, False, True, True], [True, True, True, False]])
    width = torch.ones(2, 4, dtype=torch.float64)
    found = model(ids, thinning=Thinning(keep, width)).logits
    for row, layers in enumerate([(0, 2, 3), (0, 1, 2)]):
        alone = model(ids[row : row + 1], path=ComputePath(layers)).logits
        torch.testing.assert_close(found[row : row + 1], alone)
    half = model(ids, thinning=Thinning(keep | True, width / 2)).logits
    torch.testing.assert_close(half, model(ids, path=ComputePath(top_k=0.5)).logits)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler uses what is going
def test_one_graph_serves_all_exits_and_each_sub_path_has_its_own(
    make_trainer: MakeTrainer,
) -> None:
    thinned = "layer_dropout: 0.5, sample_top_k: true, ramp_steps: 0"
    words = elastic(sub_paths=f"{{names: [fast, ultra_deep], {thinned}}}")
    exits = "model.exits={layers: [0, 1], own_norms: true}"
    trainer = make_trainer(FP64, *SHAPE, exits, words, "model.num_layers=3")
    objective = trainer.objective
    assert isinstance(objective, Elastic)
    assert trainer.model.routing is not None
    trainer.model.routing.set("bias_rate", 0.0)  # or the second pass would route differently
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    options: Any = {"fullgraph": True, "dynamic": False, "backend": counter}
    eager = objective.whole, objective.again
    compiled = tuple(torch.compile(each, **options) for each in eager)
    for step in range(1, 5):
        batch, results = prepared(trainer, step), []
        for objective.whole, objective.again in (eager, compiled):
            result = trainer.stepper.take_step(batch, trainer.settings, 0.0)
            results.append((result.loss, *result.aux_losses.values(), result.grad_norm))
        assert results[1] == pytest.approx(results[0], rel=1e-9)
    torch._dynamo.reset()
    graphs = [one for one in counter.graphs if len(one.graph.nodes)]
    assert len(graphs) == 1 + len(objective.paths)


def test_the_norm_of_an_exit_rests_while_another_one_is_trained(make_trainer: MakeTrainer) -> None:
    """Weight, moments and step count: a gradient of zero would still move them."""
    adamw = "training.optimizer={type: adamw, lr: 0.1, weight_decay: 0.5}"
    trainer = make_trainer(*SHAPE, OWN_NORMS, elastic(sub_paths="null"), adamw)
    (optimizer,) = trainer.stepper.optimizers
    seen: list[dict[str, Any]] = []
    for step in range(1, 7):
        trainer.stepper.take_step(prepared(trainer, step), trainer.settings, 1.0)
        norms = trainer.model.exit_norms.named_parameters()
        states = {name: [p.detach().clone(), *optimizer.state[p].values()] for name, p in norms}
        seen.append({n: [torch.as_tensor(v).clone() for v in vs] for n, vs in states.items()})
    for name, parity in (("0.weight", 0), ("2.weight", 1)):  # of the steps that train it
        for step, (before, after) in enumerate(pairwise(seen), start=2):
            rests = [torch.equal(a, b) for a, b in zip(before[name], after[name], strict=False)]
            assert len(rests) in (1, 4)  # the weight, the moments and the count of steps
            assert all(rests) == (step % 2 != parity), (name, step)


def test_a_run_resumes_bit_for_bit(make_trainer: MakeTrainer) -> None:
    words = elastic(sub_paths="{layer_dropout: 0.5, sample_top_k: true, ramp_steps: 3}")
    often = "training.checkpoint={every_steps: 2, keep: 9}"
    straight = make_trainer(
        *SHAPE, OWN_NORMS, words, "model.dropout=0.1", often, "training.max_steps=4"
    )
    straight.fit()
    resumed = resume_trainer(straight.run, "2")
    resumed.fit()
    assert_equal_tensors(resumed.model.state_dict(), straight.model.state_dict())


def test_the_whole_model_of_one_with_exits_exports(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(
        *(
            "model.num_layers=4",
            "model.exits.own_norms=true",
            "tokenizer={type: bpe, vocab_size: 300}",
        ),
        *("training.objective={type: elastic, sub_paths: null}", "training.max_steps=1"),
    )
    trainer.fit()
    done = export_run(str(trainer.run.path), "last")
    assert "the norms of its exits are left out; the model runs whole" in done.remarks
    ids = torch.arange(20)[None]
    with torch.no_grad():
        theirs = LlamaForCausalLM.from_pretrained(done.folder)(ids).logits
        torch.testing.assert_close(trainer.model.eval()(ids).logits, theirs, atol=1e-5, rtol=1e-5)


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "nothing to train": ((elastic("null", "null"),), "has nothing to train beside the whole"),
    "a prefix": (
        (*SHAPE, elastic(sub_paths="{names: [fast, expert]}")),
        "path 'expert' begins the whole model, so its exit is trained on the same pass",
    ),
    "no such path": (
        (*SHAPE, elastic(sub_paths="{names: [faster]}")),
        "there is no compute path 'faster'. Did you mean 'fast'",
    ),
    "the last layer": (
        (*SHAPE, "model.exits={layers: [1.0]}"),
        "exits.layers names layer 3, which is the last of the model",
    ),
    "no such exit": (
        (*SHAPE, "model.exits={layers: [7]}"),
        "model.exits.layers: there is no layer 7",
    ),
    "no such scored path": (
        (*SHAPE, "training.eval.paths=[deeep]"),
        "no compute path 'deeep'. Did",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_named(make_trainer: MakeTrainer, name: str) -> None:
    words, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        make_trainer(*words)


def test_other_paths_are_refused_on_resuming(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(*SHAPE, elastic(), "training.max_steps=1")
    trainer.fit()
    with pytest.raises(UltrathinkError, match=r"model.paths.*the run has trained these paths"):
        resume_trainer(trainer.run, overrides=["model.paths=[{name: fast, layers: 2}]"])


def test_the_loss_of_each_path_is_validated(make_trainer: MakeTrainer) -> None:
    words = ("data.val=[{type: dummy, num_documents: 2, num_words: 60, seed: 3}]", elastic())
    trainer = make_trainer(FP64, *SHAPE, *words)
    scores = trainer.scorer.score()
    assert set(scores.figures) >= {"loss/fast", "loss/standard", "loss/ultra_deep", "loss/expert"}
    held_out = trainer.objective.held_out
    assert held_out is not None
    total = count = 0.0
    trainer.model.eval()
    with torch.no_grad():
        for batch in held_out.batches(7, None):
            output = trainer.model(batch.input_ids, labels=batch.labels, path="standard")
            total, count = total + float(output.loss), count + float(output.num_tokens)
    assert scores["loss/standard"] == pytest.approx(total / count)
