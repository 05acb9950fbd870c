"""Each fault does to training what it says, in the steps that it says, and in no other."""

import math
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.benchmarks.conftest import BENCHMARKS, MakeTrainer, trainers_in
from tests.unit.training.observers import At, Recorder
from ultrathink.data.batch import Batch
from ultrathink.training.changes import Rollback, SkipSamples
from ultrathink.training.control import TrainerControl
from ultrathink.training.snapshots import Snapshot
from ultrathink.training.trainer import Trainer

# isort: split
from fault_injection import Fault, Injection
from fault_parts import fault_of, known_faults

CASES = {name: fault_of(BENCHMARKS / part.file) for name, part in known_faults().items()}
BEGIN = 4
END = 8


class Course:
    """A run with a fault from step 4 on: its batches, reports, and weights before each step."""

    def __init__(self, make_trainer: MakeTrainer, fault: Fault | None, **parts: Any) -> None:
        self.recorder = Recorder()
        model = fault.model if fault is not None else "dense"
        self.trainer: Trainer = make_trainer(
            model, f"training.max_steps={END}", callbacks=[self.recorder], **parts
        )
        self.batches: list[Batch] = []
        self.injection = Injection(self.trainer, fault, begin=BEGIN, seed=0)
        inner = self.trainer.stepper.take_step

        def take_step(batch: Batch, *rest: Any, **named: Any) -> Any:
            self.batches.append(batch)
            return inner(batch, *rest, **named)

        self.trainer.stepper.take_step = take_step  # type: ignore[method-assign]

    def run(self) -> "Course":
        self.trainer.fit()
        return self

    @property
    def losses(self) -> list[float]:
        return [report.loss for report in self.recorder.steps]


Courses = Callable[..., Course]


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Courses:
    """Courses with a fault, or with none in a ``dense`` or ``moe`` model, each run once."""

    @cache
    def run(name: str | None, model: str = "dense") -> Course:
        fault = CASES[name]() if name is not None else Fault()  # which does nothing
        if name is None:
            fault.model = model
        return Course(trainers_in(tmp_path_factory.mktemp("runs")), fault).run()

    return run


def test_there_are_enough_and_each_is_whole() -> None:
    asked = {
        *("poisoned_batch", "shuffled_labels", "lr_x10", "lr_x30", "nan_gradient"),
        *("infinite_loss", "corrupt_shard", "router_collapse", "dead_experts", "flipped_moment"),
        *("tiny_lr", "overfitting", "memory_leak", "stalled_loader"),
        *(f"out_of_memory_{where}" for where in ("forward", "backward", "step")),
    }
    assert asked <= CASES.keys()
    assert all(name == cls.name and cls.__doc__ for name, cls in CASES.items())


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("out_of_memory")])
def test_a_run_is_its_clean_twin_up_to_the_fault(course: Courses, name: str) -> None:
    struck, clean = course(name), course(None, CASES[name].model)
    assert struck.losses[: BEGIN - 1] == clean.losses[: BEGIN - 1]
    if CASES[name].group != "resources":
        assert struck.losses[BEGIN - 1 :] != clean.losses[BEGIN - 1 :]


def changed_steps(one: Course, other: Course) -> list[int]:
    pairs = zip(one.batches, other.batches, strict=True)
    return [
        step
        for step, (a, b) in enumerate(pairs, start=1)
        if not (torch.equal(a.input_ids, b.input_ids) and torch.equal(a.labels, b.labels))
    ]


def test_a_poisoned_batch_is_one_of_random_tokens(course: Courses) -> None:
    struck, clean = course("poisoned_batch"), course(None)
    assert changed_steps(struck, clean) == [BEGIN]
    poisoned = struck.batches[BEGIN - 1]
    assert torch.equal(poisoned.input_ids[:, 1:], poisoned.labels[:, :-1])
    spread = torch.bincount(poisoned.input_ids.flatten(), minlength=256)
    assert spread.max() <= 6  # 128 of 257 tokens; text would hold a letter twenty times
    assert struck.losses[BEGIN - 1] > clean.losses[BEGIN - 1]


def test_shuffled_labels_are_the_same_labels_elsewhere(course: Courses) -> None:
    struck, clean = course("shuffled_labels"), course(None)
    assert changed_steps(struck, clean) == list(range(BEGIN, END + 1))
    assert CASES["shuffled_labels"].num_steps == 20
    for one, other in zip(struck.batches[BEGIN - 1 :], clean.batches[BEGIN - 1 :], strict=True):
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.labels.sort(1).values, other.labels.sort(1).values)


def test_a_corrupt_shard_comes_back_with_its_samples() -> None:
    fault = CASES["corrupt_shard"]()
    active = [offset for offset in range(-50, 100) if fault.is_active(offset)]
    assert active == [0, 1, 2, 3, 40, 41, 42, 43, 80, 81, 82, 83]


def test_a_corrupt_shard_has_the_same_damage_each_time(course: Courses) -> None:
    struck = course("corrupt_shard")
    fault, moment = CASES["corrupt_shard"](), struck.injection.moment
    batch = struck.batches[0]
    found = []
    for offset in (1, 41, 2):
        moment.offset = offset
        found.append(fault.on_batch(batch, moment).input_ids)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert (found[0] == found[0][:, :1]).all()


def test_overfitting_repeats_two_batches(course: Courses) -> None:
    batches = course("overfitting").batches[BEGIN - 1 :]
    same = [[torch.equal(one.input_ids, two.input_ids) for two in batches] for one in batches]
    assert same == [[(i - j) % 2 == 0 for j in range(5)] for i in range(5)]


@pytest.mark.parametrize(("name", "factor"), [("lr_x10", 10), ("lr_x30", 30), ("tiny_lr", 0.01)])
def test_the_rate_is_another_and_is_reported_so(
    make_trainer: MakeTrainer, name: str, factor: float
) -> None:
    one = Course(make_trainer, CASES[name]())
    used: list[float] = []
    optimizer = one.trainer.stepper.optimizers[0]
    optimizer.register_step_pre_hook(lambda *_: used.append(optimizer.param_groups[0]["lr"]))
    rates = [report.lr for report in one.run().recorder.steps]
    expected = [0.003] * (BEGIN - 1) + [0.003 * factor] * (END - BEGIN + 1)
    assert rates == used == pytest.approx(expected)


def test_an_infinite_loss_is_met_three_times(course: Courses) -> None:
    losses = course("infinite_loss").losses
    assert [math.isinf(loss) for loss in losses] == [False] * 3 + [True] * 3 + [False] * 2


def test_a_nan_gradient_comes_with_a_sound_loss(course: Courses) -> None:
    steps = course("nan_gradient").recorder.steps
    assert all(math.isfinite(report.loss) for report in steps)
    assert [math.isnan(report.grad_norm) for report in steps] == [False] * 3 + [True] * 5


def test_a_gradient_spike_is_a_thousand_times_the_norm(course: Courses) -> None:
    struck, clean = course("gradient_spike"), course(None)
    ratios = [
        one.grad_norm / other.grad_norm
        for one, other in zip(struck.recorder.steps, clean.recorder.steps, strict=True)
    ]
    assert ratios[: BEGIN - 1] == [1.0] * 3
    assert ratios[BEGIN - 1] == pytest.approx(1000, rel=0.1)
    assert struck.losses[BEGIN - 1] == clean.losses[BEGIN - 1]


def test_a_flipped_moment_has_the_other_sign(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("dense", "training.max_steps=4")
    injection = Injection(trainer, None, begin=1, seed=0)
    trainer.fit()
    states = trainer.stepper.optimizers[0].state.values()
    before = [(state["exp_avg"].clone(), state["exp_avg_sq"].clone()) for state in states]
    CASES["flipped_moment"]().before_update(injection.moment)
    for (average, square), state in zip(before, states, strict=True):
        assert average.abs().sum() > 0
        assert torch.equal(state["exp_avg"], -average)
        assert torch.equal(state["exp_avg_sq"], square)


def test_one_bit_of_one_weight_flips(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("dense", "training.max_steps=4")
    injection = Injection(trainer, None, begin=1, seed=3)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    CASES["bit_flip"]().before_update(injection.moment)
    changed = [
        (old.item(), new.item())
        for name, value in trainer.model.named_parameters()
        for old, new in [*zip(before[name].flatten(), value.flatten(), strict=True)]
        if not torch.equal(old, new)
    ]
    trainer.close()
    assert len(changed) == 1
    bits = [np.float32(value).view(np.int32) for value in changed[0]]
    assert bin(bits[0] ^ bits[1]).count("1") == 1
    assert abs(changed[0][1]) > 1e18


def shares(one: Course, step: int) -> dict[str, list[float]]:
    """Of each group, the largest share of tokens that an expert has, over its layers."""
    report = next(report for report in one.recorder.steps if report.step == step)
    assert report.experts is not None
    statistics = report.experts
    return {
        group.name: (statistics.load[:, group.start : group.stop].max(1) / statistics.num_tokens)
        .round(3)
        .tolist()
        for group in statistics.groups
    }


def test_collapsed_routers_send_all_to_one(course: Courses) -> None:
    struck = course("router_collapse")
    assert min(min(values) for values in shares(struck, BEGIN).values()) > 0.97
    assert max(max(values) for values in shares(struck, BEGIN - 1).values()) < 0.97
    sure = struck.recorder.steps[BEGIN - 1].experts
    assert sure is not None
    confidence = sure.confidence / sure.num_tokens
    assert confidence.min() > 0.95


def test_dead_experts_get_no_token(course: Courses) -> None:
    struck = course("dead_experts")
    report = struck.recorder.steps[-1]
    assert report.experts is not None
    dead = report.experts.load == 0
    for layer in dead:  # knowledge 8 top-2, skill 4 top-2, meta 4 top-1
        assert layer[:6].all()
        assert layer[8:10].all()
        assert layer[12:15].all()
        assert layer.sum() == 11


def test_a_leak_grows_with_every_step(course: Courses) -> None:
    one = course("memory_leak")
    fault = one.injection.fault
    assert sum(tensor.nbytes for tensor in fault.kept) == (END - BEGIN + 1) * 2**21  # type: ignore[union-attr]
    assert one.losses == course(None).losses


def test_a_stalled_loader_is_waited_for(course: Courses) -> None:
    one = course("stalled_loader")
    assert one.losses == course(None).losses
    waits = [report.data_wait for report in one.recorder.steps]
    assert [wait >= 0.15 for wait in waits] == [False] * (BEGIN - 1) + [True] * (END - BEGIN + 1)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space are Linux's")
def test_there_is_memory_for_half_of_a_batch() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from fault_memory import OutOfMemoryFault, need\n"
        "need(8)\n"
        "fault = OutOfMemoryFault(); fault.limit(); fault.limit(); need(4)\n"
        "try:\n"
        "    need(8)\n"
        "except RuntimeError as error:\n"
        '    assert "can\'t allocate memory" in str(error), error\n'
        "    fault.end(); need(8); print('as it should be')\n"
    )
    command = [sys.executable, "-c", code, str(BENCHMARKS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "as it should be\n", done.stderr


class Back(At):
    """Goes back once, from step 6 to the snapshot of step 2."""

    def __init__(self, *, skip: int = 0) -> None:
        self.kept: list[Snapshot] = []
        self.skip = skip
        super().__init__(step2=self.keep, step6=self.back)

    def keep(self, control: TrainerControl) -> None:
        if not self.kept:
            self.kept.append(control.snapshot())

    def back(self, control: TrainerControl) -> None:
        if self.kept and self.skip >= 0:
            control.request(Rollback(self.kept[0], skip_data=False), reason="test")
            if self.skip:
                control.request(SkipSamples(self.skip), reason="test")
            self.skip = -1


@pytest.mark.parametrize(
    ("name", "skip", "struck"),
    [
        ("infinite_loss", 0, [4, 5, 6]),  # of its time: over when the steps are taken again
        ("poisoned_batch", 0, [4, 8]),  # of the data: met again with its samples
        ("poisoned_batch", 8, [4]),  # which were left out
    ],
)
def test_what_follows_time_is_over_after_a_rollback_and_what_follows_data_is_not(
    make_trainer: MakeTrainer, name: str, skip: int, struck: list[int]
) -> None:
    one = Course(make_trainer, CASES[name](), controllers=[Back(skip=skip)]).run()
    assert [report.step for report in one.recorder.steps] == [*range(1, 7), *range(3, 9)]
    if name == "infinite_loss":
        found = [n for n, loss in enumerate(one.losses, start=1) if math.isinf(loss)]
    else:  # random tokens are spread evenly, text is not
        counts = [torch.bincount(batch.labels.flatten() + 100).max() for batch in one.batches]
        found = [n for n, count in enumerate(counts, start=1) if count <= 8]
    assert found == struck


def test_a_run_that_never_ends_is_ended(make_trainer: MakeTrainer) -> None:
    class Again(Back):
        def back(self, control: TrainerControl) -> None:
            control.request(Rollback(self.kept[0], skip_data=False), reason="test")

    one = Course(make_trainer, None, controllers=[Again()])
    with pytest.raises(RuntimeError, match="32 steps were taken, and the run is not over"):
        one.run()
