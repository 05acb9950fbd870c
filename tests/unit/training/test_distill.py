"""Learning from a teacher, against whole logits; what a run keeps of it, and what it refuses."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tests.unit.training.conftest import MakeTrainer
from tests.unit.training.observers import assert_equal_tensors
from tests.unit.training.weighted import weights_of
from ultrathink.checkpoint.format import load_checkpoint
from ultrathink.core.errors import CheckpointError, ConfigError, UltrathinkError
from ultrathink.data.batch import IGNORED, Batch
from ultrathink.interop.export import export_run
from ultrathink.recipes.resume import resume_trainer
from ultrathink.runs.loading import load_model
from ultrathink.training.model_set import FrozenModel
from ultrathink.training.objectives.distill import Distillation
from ultrathink.training.trainer import Trainer

FP64 = "training.precision=fp64"
BPE = "tokenizer={type: bpe, vocab_size: 300}"
OTHER_TEXT = ("data.train=[{type: dummy, num_documents: 90, num_words: 50}]",)
# Large weights, so that its predictions differ from the student's; of another width and depth.
TEACHER = ("model.hidden_size=16", "model.num_layers=3", "model.init={std: 0.5}", "run.seed=9")


@pytest.fixture
def teacher(finished: MakeTrainer) -> Path:
    """A run to learn from; it was trained with dropout."""
    return finished(*TEACHER, "model.dropout=0.5", "training.max_steps=1").run.path


def objective(teacher: Path, **options: Any) -> str:
    given = "".join(f", {name}: {value}" for name, value in options.items())
    return f"training.objective={{type: distill, teacher: {teacher}{given}}}"


def reference(trainer: Trainer, teacher: Path, batch: Batch) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy and divergence of a batch, from the logits of all its positions."""

    def log_probabilities(model: Any) -> Tensor:
        logits = model(
            batch.input_ids, positions=batch.positions, document_ids=batch.document_ids
        ).logits
        return torch.log_softmax(logits / 2.0, -1), torch.log_softmax(logits, -1)

    ours, plain = log_probabilities(trainer.model)
    theirs, _ = log_probabilities(load_model(teacher, "last")[0].double())
    trained = (batch.labels != IGNORED).double()
    if batch.loss_weights is not None:
        trained = trained * batch.loss_weights
    chosen = plain.gather(-1, batch.labels.clamp(min=0)[..., None])[..., 0]
    p, q = theirs.detach(), ours
    if trainer.training.objective.direction == "reverse":  # type: ignore[attr-defined]
        p, q = q, p
    kl = (p.exp() * (p - q)).sum(-1)
    return tuple((each * trained).sum() / trained.sum() for each in (-chosen, kl))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("direction", "micro", "is_weighed"),
    [("forward", 4, False), ("forward", 1, True), ("reverse", 1, False), ("reverse", 1, True)],
)
def test_a_step_is_that_of_whole_logits(
    make_trainer: MakeTrainer, teacher: Path, direction: str, micro: int, is_weighed: bool
) -> None:
    words = objective(teacher, direction=direction, temperature=2.0, weight=0.25)
    trainer = make_trainer(FP64, words, f"training.micro_batch_size={micro}")
    batch = trainer.loader.next_batch()
    batch.labels[0, 5:] = IGNORED  # rows weigh differently
    if is_weighed:
        batch = replace(batch, loss_weights=weights_of(batch))
    loss, kl = reference(trainer, teacher, batch)
    gradients = torch.autograd.grad(
        loss + 0.25 * 4.0 * kl, [p for p in trainer.model.parameters() if p.requires_grad]
    )
    result = trainer.stepper.take_step(batch, trainer.settings, 1.0)
    assert result.loss == pytest.approx(loss.item(), rel=1e-10)
    assert result.aux_losses == {"kl": pytest.approx(kl.item(), rel=1e-10)}
    assert kl.item() > 0.01
    norm = torch.nn.utils.get_total_norm(gradients).item()
    assert result.grad_norm == pytest.approx(norm, rel=1e-9)


def test_weight_and_temperature_are_live(make_trainer: MakeTrainer, teacher: Path) -> None:
    """What is set during a run holds from the next step on."""
    results = []
    for weight, temperature in ((3.0, 2.0), (1.0, 1.0)):
        words = objective(teacher, weight=weight, temperature=temperature)
        trainer = make_trainer(FP64, words)
        assert isinstance(trainer.objective, Distillation)
        trainer.objective.weight.fill_(3.0)
        trainer.objective.temperature.fill_(2.0)
        results.append(trainer.stepper.take_step(trainer.loader.next_batch(), trainer.settings, 1))
    assert results[0].grad_norm == results[1].grad_norm
    assert results[0].aux_losses == results[1].aux_losses


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler uses what is going
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_compiled_pass_is_one_graph_for_all_temperatures(
    make_trainer: MakeTrainer, teacher: Path, direction: str
) -> None:
    """Values and gradients are those of the eager pass, the teacher's graph is its own."""
    trainer = make_trainer(FP64, objective(teacher, direction=direction, temperature=2.0))
    learned, batch = trainer.objective, trainer.loader.next_batch()
    assert isinstance(learned, Distillation)
    found = []
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(learned.sums_beside, fullgraph=True, dynamic=False, backend=counter)
    asked = FrozenModel(learned.teacher.model)
    asked._pass = torch.compile(asked._pass, fullgraph=True, dynamic=False, backend=counter)
    for passes, frozen in ((learned.sums_beside, learned.teacher), (compiled, asked)):
        learned.sums_beside, learned.teacher = passes, frozen
        for temperature in (2.0, 0.5):
            learned.temperature.fill_(temperature)
            learned.weight.fill_(1 / temperature)
            result = trainer.stepper.take_step(batch, trainer.settings, 0.0)
            found.append((result.loss, result.aux_losses["kl"], result.grad_norm))
    torch._dynamo.reset()
    assert counter.frame_count == 2  # the student's and the teacher's
    for eager, graph in zip(found[:2], found[2:], strict=True):
        assert graph == pytest.approx(eager, rel=1e-10)


def test_a_teacher_is_frozen_and_no_part_of_a_checkpoint(
    make_trainer: MakeTrainer, teacher: Path
) -> None:
    """It draws no random numbers either, though it was trained with dropout."""
    trainer = make_trainer(objective(teacher, precision="bf16"), "training.max_steps=2")
    frozen = trainer.objective.models.frozen["teacher"]
    assert {p.dtype for p in frozen.model.parameters()} == {torch.bfloat16}
    before = {name: value.clone() for name, value in frozen.model.state_dict().items()}
    random_state = torch.get_rng_state()
    with frozen.states(torch.arange(32)[None], None, None) as (states, weight):
        assert (states.shape, weight.shape) == ((1, 32, 16), (257, 16))
    assert torch.equal(random_state, torch.get_rng_state())
    trainer.fit()
    after = frozen.model.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    state: Any = load_checkpoint(trainer.run.checkpoint("last"))
    assert state["model"].keys() == trainer.model.state_dict().keys()
    assert len(state["identity"]["frozen_hash"]) == 64


def test_a_run_continues_bit_for_bit_and_only_with_its_teacher(
    make_trainer: MakeTrainer, finished: MakeTrainer, teacher: Path, tmp_path: Path
) -> None:
    place = tmp_path / "teacher"
    shutil.copytree(teacher, place, symlinks=True)
    words = (objective(place), "model.dropout=0.1", "training.checkpoint={every_steps: 2, keep: 9}")
    straight = make_trainer(*words, "training.max_steps=4", "run.name=straight")
    straight.fit()
    resumed = resume_trainer(straight.run, "2")
    resumed.fit()
    assert_equal_tensors(resumed.model.state_dict(), straight.model.state_dict())

    place.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError) as gone:
        resume_trainer(straight.run, "2")
    reported = str(gone.value)
    assert reported.startswith(
        f"the teacher of this run cannot be read (there is no run '{place}'."
    )
    assert reported.endswith("name its new place: training.objective.teacher=PLACE.")
    moved = resume_trainer(
        straight.run, "2", overrides=[f"training.objective.teacher={tmp_path / 'elsewhere'}"]
    )
    moved.close()

    other = finished(*TEACHER, "training.max_steps=1", "run.seed=10")
    with pytest.raises(
        CheckpointError, match=r"frozen model of training.objective changed since the check"
    ):
        resume_trainer(
            straight.run, "2", overrides=[f"training.objective.teacher={other.run.path}"]
        )


def test_teachers_that_do_not_fit_are_refused(
    make_trainer: MakeTrainer, finished: MakeTrainer, teacher: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as larger:
        make_trainer(objective(teacher), "model.vocab_size=300")
    assert str(larger.value) == (
        f"training.objective.teacher={teacher} has a vocabulary of 257 tokens, but the model one "
        f"of 300; set model.vocab_size=257, or name a teacher with the model's vocabulary."
    )
    bpe, other = (finished(BPE, *words, "training.max_steps=1").run for words in ((), OTHER_TEXT))
    with pytest.raises(ConfigError, match=r"has another tokenizer than this run, so its token ids"):
        make_trainer(BPE, f"training.init_from={bpe.path}", objective(other.path))
    # One that has no tokenizer yet takes that of its teacher.
    student = make_trainer(BPE, *OTHER_TEXT, objective(bpe.path))
    assert student.identity["tokenizer_hash"] == load_model(bpe.path)[1].fingerprint
    with pytest.raises(CheckpointError, match=r"^the teacher of this run cannot be read"):
        make_trainer(objective(tmp_path / "nothing"))
    with pytest.raises(UltrathinkError, match=r"no objective called 'distil'. Did you mean 'disti"):
        make_trainer("training.objective={type: distil, teacher: x}")
    with pytest.raises(ConfigError, match=r"has no such figure. Did you mean 'token_accuracy'"):
        make_trainer("training.checkpoint.best_by=token_acuracy")


def test_a_model_of_hugging_face_teaches(
    make_trainer: MakeTrainer, finished: MakeTrainer, tmp_path: Path
) -> None:
    """It is opened as for ``init_from``, and learned from by a student of another shape."""
    run = finished(*TEACHER, "training.max_steps=1", BPE).run
    export_run(str(run.path), output=tmp_path / "hf")
    results = []
    for place in (run.path, f"hf:{tmp_path / 'hf'}"):
        trainer = make_trainer(
            FP64, objective(Path(place)), "tokenizer={type: hf, vocab_size: 300}"
        )
        batch = trainer.loader.next_batch()
        results.append(trainer.stepper.take_step(batch, trainer.settings, 1.0).aux_losses["kl"])
    assert results[0] == pytest.approx(results[1], rel=1e-6)
