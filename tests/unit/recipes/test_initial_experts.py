"""``training.init_from`` into a model with other slots for experts, or with experts at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.training.conftest import TINY, MakeTrainer, finished, make_trainer
from tests.unit.training.expert_checks import inconsistencies, logits_of
from ultrathink.config import load_config
from ultrathink.core.errors import UltrathinkError
from ultrathink.recipes.train import build_trainer
from ultrathink.training.changes import AddExpert, PruneExpert
from ultrathink.training.trainer import Trainer

__all__ = ["finished", "make_trainer"]

MOE = (
    "model.moe={groups: [{name: a, num_experts: 4, top_k: 2, max_experts: 6}, "
    "{name: b, num_experts: 3, top_k: 1}], intermediate_size: 16, shared_size: 16, "
    "routing: {warmup_steps: 0}}"
)
IDS = torch.randint(0, 250, (4, 32), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A run whose layers have different experts, some of them split, after a few more steps."""
    place = tmp_path_factory.mktemp("changed")
    options = [*TINY, f"run.dir={place}", MOE, "training.max_steps=6"]
    trainer = build_trainer(load_config("debug", options))
    trainer.start()
    for step in range(6):
        trainer.train_step()
        if step == 2:
            AddExpert("all", "a").apply(trainer.parts)
            AddExpert(0, "a").apply(trainer.parts)
            PruneExpert(1, "a", 1).apply(trainer.parts)
            PruneExpert("all", "b", 0).apply(trainer.parts)
    trainer.save()
    trainer.saving.wait_until_written()
    trainer.close()
    return trainer


def started(make_trainer: MakeTrainer, run: Path, *overrides: str) -> Trainer:
    return make_trainer(MOE, f"training.init_from={run}@last", *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.moe.groups.0.max_experts=9",),
        ("model.moe.groups.0.max_experts=7", "model.moe.groups.1.max_experts=5"),
        ("model.moe.groups.1={name: b, num_experts: 2, top_k: 1}",),
    ],
)
def test_the_experts_of_the_checkpoint_are_those_of_the_model_in_any_slots(
    make_trainer: MakeTrainer, changed: Trainer, overrides: tuple[str, ...]
) -> None:
    """reap-mlx 80: no layer is given the number of another."""
    trainer = started(make_trainer, changed.run.path, *overrides)
    torch.testing.assert_close(
        logits_of(trainer, IDS), logits_of(changed, IDS), rtol=1e-5, atol=1e-6
    )
    found = [layer.router for layer in trainer.model.expert_layers().values()]
    counts = [[int(router.active[slots].sum()) for _, slots in router.groups()] for router in found]
    assert counts == [[6, 2], [4, 2]]
    assert inconsistencies(trainer) == []
    trainer.start()
    trainer.train_step()
    if "model.moe.groups.0.max_experts=9" in overrides:
        AddExpert("all", "a").apply(trainer.parts)
    assert inconsistencies(trainer) == []
    trainer.close()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.moe.groups.0={num_experts: 8, max_experts: 8}",), "num_experts is 8, but .* "
         "have 6 experts of group 'a' in layer 0; set it to 4, and max_experts"),
        (("model.moe.groups.0={name: a, num_experts: 4, top_k: 2, max_experts: 5}",),
         "groups.0 has 5 slots, but .* 6 experts of group 'a' in layer 0; set max_experts=6"),
    ],
)  # fmt: skip
def test_experts_that_have_no_slot_are_refused(
    make_trainer: MakeTrainer, changed: Trainer, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UltrathinkError, match=message):
        started(make_trainer, changed.run.path, *overrides)


DENSE = ("model.intermediate_size=32", "training.max_steps=3")
COPIES = "model.moe={groups: [{name: a, num_experts: 4, top_k: 2, max_experts: 5}%s], %s}"


@pytest.mark.parametrize(
    ("feed_forward", "groups", "more"),
    [
        ("swiglu", "", "intermediate_size: 32"),
        ("swiglu", ", {name: b, num_experts: 3, top_k: 3}",
         "intermediate_size: 32, score: sigmoid"),
        ("swiglu", ", {name: b, num_experts: 3, top_k: 2}",
         "intermediate_size: 32, gate_scale: 2.5, shared_size: 16, layers: [1]"),
        ("relu2", ", {name: b, num_experts: 1, top_k: 1}", "intermediate_size: 32"),
    ],
)  # fmt: skip
def test_copies_of_a_dense_layer_compute_the_same(
    make_trainer: MakeTrainer, finished: MakeTrainer, feed_forward: str, groups: str, more: str
) -> None:
    options = (*DENSE, f"model.feed_forward={feed_forward}")
    dense = finished(*options)
    experts = COPIES % (groups, more)
    trainer = make_trainer(*options, experts, f"training.init_from={dense.run.path}@last")
    torch.testing.assert_close(logits_of(trainer, IDS), logits_of(dense, IDS), rtol=0, atol=1e-5)
    assert inconsistencies(trainer) == []
    trainer.start()
    before = trainer.train_step().loss
    assert trainer.model.routing is not None
    assert trainer.model.routing.get("warmup") == pytest.approx(0.01)  # routers start anew
    assert abs(before - trainer.train_step().loss) < 1
    trainer.close()


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        (COPIES % ("", "intermediate_size: 16"), "set model.moe.intermediate_size=32"),
        (COPIES % (", {name: b, num_experts: 3, top_k: 1}", "intermediate_size: 32"),
         "group 'b' has top_k = 1, whose gate .*; set model.moe.groups.1.top_k=2"),
        (COPIES % ("", "intermediate_size: 32, normalize_gates: false"),
         "set model.moe.normalize_gates=true"),
    ],
)  # fmt: skip
def test_experts_that_cannot_compute_the_same_are_refused(
    make_trainer: MakeTrainer, finished: Callable[..., Any], moe: str, message: str
) -> None:
    dense = finished(*DENSE)
    with pytest.raises(UltrathinkError, match=message):
        make_trainer(*DENSE, moe, f"training.init_from={dense.run.path}@last")
