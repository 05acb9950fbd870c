"""A compiled step routes as the eager one does, and reads the live controls again each time."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from tests.unit.model.experts.mixtures import FOUR, mixture
from ultrathink.training.objectives.pretrain import loss_function

# torch.compile uses deprecated parts of torch itself; every other warning is an error here.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
compiled_test = [
    pytest.mark.compiled,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
]
TWO = FOUR[1:3]
# Each live value, and one that shows.
CHANGES = {
    "temperature": 0.25,
    "jitter": 0.5,
    "capacity_factor": 0.5,
    "expert_dropout": 0.6,
    "load": 3.0,
    "importance": 3.0,
    "entropy": 3.0,
    "z": 3.0,
}


def step(losses: Any, model: Any, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """What one compiled or eager step tells, and its gradients, with the same random numbers."""
    torch.manual_seed(5)
    model.zero_grad()
    sums = losses(*batch, None, None)
    (sums.loss + sum(sums.aux_losses.values())).backward()
    found = {"loss": sums.loss, **sums.aux_losses, **sums.stats}
    found |= {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: value.detach().clone() for name, value in found.items()}


def differing(one: dict[str, Tensor], other: dict[str, Tensor], limit: float) -> list[str]:
    return [
        name for name in one if (one[name] - other[name]).norm() > limit * (1e-6 + one[name].norm())
    ]


def test_a_compiled_step_in_bfloat16_is_near_the_eager_one(
    make_model: Any, batch: tuple[Tensor, Tensor]
) -> None:
    model = make_model(moe=mixture(TWO, shared_size=16, layers=[0]), num_layers=1)
    model.compute_dtype = torch.bfloat16
    eager = step(loss_function(model), model, batch)
    losses = torch.compile(loss_function(model), fullgraph=True, backend="aot_eager")
    # A sum that is rounded otherwise sends a token to another expert here and there.
    assert differing(eager, step(losses, model, batch), 0.15) == []


def test_live_controls_change_what_they_should_without_compiling_again(
    make_model: Any, batch: tuple[Tensor, Tensor]
) -> None:
    model = make_model(moe=mixture(TWO), num_layers=1, dtype=torch.float64)
    losses = torch.compile(loss_function(model), fullgraph=True, backend="aot_eager")
    found = {}
    for name, value in {"": None, **CHANGES}.items():
        model.routing.reset()
        if name:
            model.routing.set(name, value)
        found[name] = step(losses, model, batch)
        assert differing(found[name], step(loss_function(model), model, batch), 1e-12) == []
    model.routing.reset()
    model.routing.warm_up(1)
    found["warmup"] = step(losses, model, batch)
    assert counters["stats"]["unique_graphs"] == 1
    plain = found.pop("")
    for name, changed in found.items():
        assert differing(plain, changed, 0.01) != [], name
    for name in ("load", "importance", "entropy", "z"):
        ratio = found[name][f"moe_{name}"] / plain[f"moe_{name}"]
        configured = getattr(model.config.moe.balance, name)
        assert float(ratio) == pytest.approx(CHANGES[name] / configured, rel=1e-6)  # kept in fp32
        others = {"loss", "moe_load", "moe_importance", "moe_entropy", "moe_z"} - {f"moe_{name}"}
        assert all(torch.equal(found[name][other], plain[other]) for other in others)


@pytest.mark.parametrize(
    ("mode", "backend"),
    [
        ("selective", "aot_eager"),
        pytest.param("full", "inductor", marks=compiled_test),
    ],
)
def test_a_compiled_step_routes_as_the_eager_one_and_so_does_its_recomputation(
    make_model: Any, batch: tuple[Tensor, Tensor], mode: str, backend: str
) -> None:
    """The noise is drawn once: drawn again, gradients would be those of other experts."""
    routing = {"jitter": 0.3, "expert_dropout": 0.2, "capacity_factor": 1.0}
    model = make_model(moe=mixture(TWO, routing=routing, shared_size=16), num_layers=1)
    model.routing.get_buffer("warmup").fill_(0.3)
    eager = step(loss_function(model), model, batch)
    model.set_activation_checkpointing(mode)
    losses = torch.compile(loss_function(model), fullgraph=True, backend=backend)
    assert differing(eager, step(losses, model, batch), 1e-4) == []


@torch.no_grad()
def test_scoring_is_one_graph(make_model: Any, batch: tuple[Tensor, Tensor]) -> None:
    model = make_model(moe=mixture(TWO, routing={"capacity_factor": 0.5}), num_layers=1).eval()
    losses = torch.compile(loss_function(model), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(losses(*batch, None, None), loss_function(model)(*batch, None, None))
