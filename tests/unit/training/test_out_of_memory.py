import gc
import json
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.unit.training.conftest import MakeTrainer
from tests.unit.training.experts import MIXTURE, NOISE, ROUTING
from tests.unit.training.limited_memory import (
    MORE_THAN_ANY,
    LimitedMemory,
    assert_same_gradients,
    keep_gradients,
    run_out_of_memory,
)
from tests.unit.training.observers import At, Recorder, asks, final_state, records, without_time
from ultrathink.core.errors import OutOfMemoryError
from ultrathink.recipes.resume import resume_trainer
from ultrathink.training.changes import Rollback, SetMicroBatchSize
from ultrathink.training.out_of_memory import (
    half_of,
    is_out_of_memory,
    problem_of,
    smaller_until_it_fits,
)
from ultrathink.training.trainer import Trainer

WHOLE = "training.micro_batch_size=4"
HALF = "training.micro_batch_size=2"


# -- what it looks like ------------------------------------------------------------------------


@pytest.mark.parametrize("allocate", [run_out_of_memory, lambda: bytearray(1 << 62)])
def test_real_allocators_are_recognized(allocate: Callable[[], Any]) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as error:
        allocate()
    assert is_out_of_memory(error.value)
    assert problem_of(error.value) in (
        f"{MORE_THAN_ANY / 2**20:,.4g} MiB could not be allocated",
        "MemoryError",
    )


CUDA = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB"


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (torch.OutOfMemoryError(CUDA), "2.50 GiB could not be allocated"),
        (
            RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
            "7.629e-06 MiB could not be allocated",
        ),
        (
            RuntimeError("MPS backend out of memory (8.00 GB). Tried to allocate 2.00 GB"),
            "MPS backend out of memory (8.00 GB). Tried to allocate 2.00 GB",
        ),
        (RuntimeError("std::bad_alloc"), "std::bad_alloc"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel"), "CUDA error: out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when"), None),
        (ValueError("std::bad_alloc"), ""),
        (RuntimeError("shapes differ"), ""),
        (OSError(12, "no"), ""),
    ],
)
def test_errors_are_recognized_by_their_kind_and_text(
    error: Exception, problem: str | None
) -> None:
    """An empty problem: another kind of error; None: its text is the problem."""
    assert is_out_of_memory(error) == (problem != "")
    if problem != "":
        assert problem_of(error) == (problem or str(error))


# -- repeating ---------------------------------------------------------------------------------


def test_a_failed_attempt_has_let_go_of_its_tensors_before_the_next() -> None:
    alive: list[weakref.ref[Any]] = []

    def attempt(size: int) -> int:
        if size > 2:
            tensor = torch.zeros(8)
            loop: list[Any] = [tensor]
            loop.append(loop)  # which counting references alone does not free
            alive.append(weakref.ref(tensor))
            run_out_of_memory()
        assert [reference() for reference in alive] == [None] * len(alive)
        return size

    gc.disable()
    try:
        result, fit = smaller_until_it_fits(attempt, 8, lambda size, problem: size // 2)
    finally:
        gc.enable()
    assert (result, fit.size, len(alive)) == (2, 2, 2)
    assert "could not be allocated" in fit.problem


def test_another_error_is_not_repeated(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(WHOLE)
    calls: list[int] = []

    def broken(*args: Any) -> Any:
        calls.append(1)
        raise RuntimeError("broken")

    trainer.objective.sums = broken
    with pytest.raises(RuntimeError, match="broken"):
        trainer.stepper.take_step(trainer.loader.next_batch(), trainer.settings, 1.0)
    assert calls == [1]
    assert trainer.settings.micro_batch_size == 4


MODELS = {"dense": (), "experts": (*MIXTURE, ROUTING)}


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("model", MODELS)
def test_gradients_are_those_of_a_batch_that_fitted(
    make_trainer: MakeTrainer, model: str, where: str
) -> None:
    words = ("training.precision=fp32", "training.clip=null", *MODELS[model])
    found: list[dict[str, torch.Tensor]] = [{}, {}]
    for fits, gradients in zip((4, 1), found, strict=True):
        trainer = make_trainer(*words, WHOLE)
        memory = LimitedMemory(trainer, fits=fits, where=where)
        keep_gradients(trainer, gradients)
        assert not trainer.stepper.take_step(
            trainer.loader.next_batch(), trainer.settings, 1.0
        ).skipped
    assert memory.tried == [4, 2, 1, 1, 1, 1]
    assert trainer.settings.micro_batch_size == 1
    assert_same_gradients(*found)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("model", MODELS)
def test_a_repeated_run_is_bit_for_bit_one_that_was_smaller_from_then_on(
    make_trainer: MakeTrainer, model: str, where: str
) -> None:
    """With all that draws random numbers; the failure comes after a micro-batch that fitted."""
    words = (
        "training.max_steps=4",
        "training.optimizer={type: muon, lr: 0.01}",
        "model.dropout=0.1",
        *MODELS[model],
        *([NOISE] if model == "experts" else []),
    )
    watcher = Recorder()
    struck = make_trainer(*words, HALF, callbacks=[watcher])
    memory = LimitedMemory(struck, fits=1, where=where, after=3)  # in the second half of step 2
    struck.fit()
    assert memory.tried == [2, 2, 2, 2, *[1] * 12]
    at = At(step1=asks(SetMicroBatchSize(1)))
    clean = make_trainer(*words, HALF, controllers=[at])
    clean.fit()
    assert without_time(records(struck.run)) == without_time(records(clean.run))
    one, other = final_state(struck.run), final_state(clean.run)
    assert [name for name in other if not torch.equal(one[name], other[name])] == []
    if model == "experts":
        assert expert_loads(struck) == expert_loads(clean)
    assert struck.loader.samples_seen == clean.loader.samples_seen == 16


def expert_loads(trainer: Trainer) -> list[Any]:
    lines = (trainer.run.path / "experts.jsonl").read_text().splitlines()
    return [[json.loads(line)[key] for key in ("num_tokens", "groups")] for line in lines]


def test_the_size_that_fits_is_on_record_and_resumed(make_trainer: MakeTrainer) -> None:
    watcher = Recorder()
    trainer = make_trainer(
        "training.max_steps=4",
        WHOLE,
        "training.checkpoint={every_steps: 2, keep: 9}",
        callbacks=[watcher],
    )
    LimitedMemory(trainer, fits=2, after=2)
    trainer.fit()
    [change] = watcher.changes
    assert (change.step, change.setting) == (2, "micro_batch_size")
    assert (change.before, change.after) == (4, 2)
    assert change.reason.startswith("step 3 ran out of memory: ")
    [line] = trainer.run.decisions.read_text().splitlines()
    record = json.loads(line)
    assert (record["rule"], record["level"]) == ("out_of_memory", 4)
    assert (record["action"], record["reasoning"]) == ("micro_batch_size", change.reason)
    later = resume_trainer(trainer.run, overrides=["training.max_steps=6"])
    assert later.settings.micro_batch_size == 2
    memory = LimitedMemory(later, fits=2)
    later.fit()
    assert memory.tried == [2] * 4
    earlier = resume_trainer(trainer.run, "2")
    assert earlier.settings.micro_batch_size == 4  # it still fitted then
    earlier.close()


@pytest.mark.parametrize(
    ("share", "size", "half"), [(12, 12, 6), (12, 6, 3), (12, 3, 1), (9, 9, 3)]
)
def test_halves_divide_the_batch(share: int, size: int, half: int) -> None:
    assert half_of(share, size) == half


def test_going_back_keeps_the_size_that_fits(make_trainer: MakeTrainer) -> None:
    kept: list[Any] = []
    steering = At(
        step1=lambda control: kept or kept.append(control.snapshot()),
        step3=lambda control: (
            kept[1:]
            or kept.append(control.request(Rollback(kept[0], skip_data=False), reason="test"))
        ),
    )
    watcher = Recorder()
    trainer = make_trainer(
        "training.max_steps=4", WHOLE, callbacks=[watcher], controllers=[steering]
    )
    memory = LimitedMemory(trainer, fits=2, after=1)
    trainer.fit()
    assert [change.setting for change in watcher.changes] == ["micro_batch_size", "rollback"]
    assert memory.tried == [4, 4, *[2] * 10]


def test_timing_the_first_steps_finds_the_size(make_trainer: MakeTrainer) -> None:
    watcher = Recorder()
    trainer = make_trainer("training.max_minutes=0.02", WHOLE, callbacks=[watcher])
    memory = LimitedMemory(trainer, fits=2)
    trainer.start()
    trainer.train_step()
    trainer.close()
    assert memory.tried.count(4) == 1
    assert [(c.step, c.before, c.after) for c in watcher.changes] == [(0, 4, 2)]


# -- where there is nothing to halve -----------------------------------------------------------


@pytest.mark.parametrize("mode", ["none", "full"])
def test_a_single_sequence_that_does_not_fit_ends_with_advice(
    make_trainer: MakeTrainer, mode: str
) -> None:
    """Advice that was followed is not given again."""
    words = ("training.max_steps=4", "training.checkpoint.every_steps=2")
    trainer = make_trainer(*words, f"training.activation_checkpointing={mode}")
    LimitedMemory(trainer, fits=0, after=3)
    with pytest.raises(OutOfMemoryError, match="single sequence of 32 tokens") as caught:
        trainer.fit()
    advice = "training.activation_checkpointing=full"
    assert (advice in str(caught.value)) == (mode == "none")
    assert all(advice in str(caught.value) for advice in ("data.seq_len", "model.hidden_size"))
    assert trainer.run.steps() == [2]
    assert resume_trainer(trainer.run).fit().name == "finished"


def test_optimizer_state_that_does_not_fit_is_reported_before_the_first_batch(
    make_trainer: MakeTrainer,
) -> None:
    trainer = make_trainer()
    huge = torch.nn.Parameter(torch.zeros(1).expand(MORE_THAN_ANY))  # takes four bytes, as it is
    trainer.stepper.optimizers[0].add_param_group({"params": [huge], "peak_lr": 0, "decayed": 0})
    with pytest.raises(OutOfMemoryError, match="for the optimizer state") as caught:
        trainer.fit()
    for advice in ("parallel.offload", "parallel.zero_stage", "model.hidden_size", "type=muon"):
        assert advice in str(caught.value)
    assert trainer.loader.samples_seen == 0


def test_an_update_that_fails_is_never_saved(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(
        "training.max_steps=4",
        "training.optimizer={type: muon, lr: 0.01}",
        "training.checkpoint.every_steps=1",
    )
    _, adamw = trainer.stepper.optimizers

    def fail(*_: Any) -> None:
        if trainer.progress.step == 2:
            run_out_of_memory()

    adamw.register_step_pre_hook(fail)  # when Muon has moved its weights already
    with pytest.raises(OutOfMemoryError, match="resume from the last one") as caught:
        trainer.fit()
    assert "not saved" in str(caught.value)
    assert trainer.run.steps() == [1, 2]


def test_validation_takes_smaller_batches(make_trainer: MakeTrainer) -> None:
    words = ("training.max_steps=2", "training.eval={every_steps: 1, batch_size: 3}")
    watchers = []
    for fits in (3, 1):
        watcher = Recorder()
        trainer = make_trainer(*words, callbacks=[watcher])
        forward, sizes = trainer.model.forward, []

        def scarce(ids: torch.Tensor, *args: Any, **options: Any) -> Any:
            if not trainer.model.training:  # noqa: B023
                sizes.append(len(ids))  # noqa: B023
                if len(ids) > fits:  # noqa: B023
                    run_out_of_memory()
            return forward(ids, *args, **options)  # noqa: B023

        trainer.model.forward = scarce  # type: ignore[method-assign]
        trainer.fit()
        assert sizes.count(3) == 1 if fits == 1 else sizes.count(3) > 2
        watchers.append(watcher)
    whole, halved = watchers
    for one, other in zip(whole.validations, halved.validations, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-6)
        assert one.num_tokens == other.num_tokens
    [reported] = [text for text in halved.messages if text.startswith("validation")]
    assert reported.startswith("validation now takes 1 sequences at a time instead of 3: ")
