"""The product of each expert's rows with its own matrix, against a loop in float64."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from ultrathink.config.experts import EXPERT_BACKENDS
from ultrathink.core.errors import UltrathinkError
from ultrathink.model.experts.layout import Layout, lay_out
from ultrathink.model.experts.products import grouped_product

BACKENDS = ("batched", "grouped_mm", "loop")
LOADS: dict[str, list[int]] = {
    "uneven": [3, 40, 17, 16, 1],
    "even": [8, 8, 8, 8, 8],
    "some empty": [0, 21, 0, 0, 6],
    "all in one": [0, 0, 33, 0, 0],
    "one row": [0, 0, 0, 1, 0],
    "none": [0, 0, 0, 0, 0],
}
PRECISIONS = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.01)]
CASES = [
    (backend, dtype, limit)
    for backend in BACKENDS
    for dtype, limit in PRECISIONS
    if (backend, dtype) != ("grouped_mm", torch.float64)  # which torch has no kernel for
]


def inputs(
    backend: str, load: list[int], dtype: torch.dtype, outputs: int = 24, width: int = 16
) -> tuple[Tensor, Tensor, Layout]:
    """Rows as ``backend`` wants them, with rubbish where they belong to no expert; weights."""
    kernel: Any = EXPERT_BACKENDS.load(backend)()
    experts = torch.tensor([[e] for e, count in enumerate(load) for _ in range(count)] + [[5]])
    shuffled = experts[torch.randperm(len(experts))]
    layout = lay_out(shuffled, 5, multiple=16, by_size=kernel.by_size)
    rows = torch.randn(len(layout.source), width).to(dtype)
    is_fill = (layout.source == len(experts)) & (torch.arange(len(rows)) < layout.ends[-1])
    rows[is_fill] = 0.0
    return rows.requires_grad_(), torch.randn(5, outputs, width).to(dtype).requires_grad_(), layout


def reference(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    parts, begin = [], 0
    for weight, end in zip(weights, ends.tolist(), strict=True):
        parts.append(rows[begin:end] @ weight.T)
        begin = end
    return torch.cat([*parts, rows.new_zeros(len(rows) - begin, weights.shape[1])])


def near(found: Tensor, expected: Tensor, limit: float) -> bool:
    return bool((found.double() - expected).norm() <= limit * expected.norm())


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize(("backend", "dtype", "limit"), CASES)
def test_products_and_gradients_equal_a_loop(
    backend: str, dtype: torch.dtype, limit: float, load: str
) -> None:
    rows, weights, layout = inputs(backend, LOADS[load], dtype)
    ordered = weights[layout.order]
    direction = torch.randn(len(rows), 24).to(dtype)
    precise = rows.detach().double().requires_grad_(), weights.detach().double().requires_grad_()
    expected = reference(precise[0], precise[1][layout.order], layout.ends)
    wanted = torch.autograd.grad((expected * direction).sum(), precise)
    out = grouped_product(rows, ordered, layout.ends, backend)
    assert out.dtype == dtype
    found = torch.autograd.grad((out * direction).sum(), (rows, weights))
    assert near(out, expected, limit)
    assert all(near(*pair, limit) for pair in zip(found, wanted, strict=True))
    end = int(layout.ends[-1])
    assert not out[end:].any()
    assert not found[0][end:].any()
    empty = torch.tensor(LOADS[load]) == 0
    assert not found[1][empty].any()


def test_gradients_that_lie_across_memory_are_taken() -> None:
    """What follows a product may hand back a view: transposed, or one number for all."""
    for backend in BACKENDS:
        rows, weights, layout = inputs(backend, LOADS["uneven"], torch.float32)
        out = grouped_product(rows, weights[layout.order], layout.ends, backend)
        plain = torch.autograd.grad(out, (rows, weights), torch.ones_like(out), retain_graph=True)
        for view in (torch.ones(24, len(rows)).T, torch.ones(()).expand_as(out)):
            found = torch.autograd.grad(out, (rows, weights), view, retain_graph=True)
            torch.testing.assert_close(found, plain)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("backend", "compiler"),
    [
        *((backend, "aot_eager") for backend in BACKENDS),
        pytest.param(
            "batched",
            "inductor",
            marks=[
                pytest.mark.compiled,
                pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
            ],
        ),
    ],
)
def test_compiled_products_equal_eager_ones_whatever_the_load(backend: str, compiler: str) -> None:
    torch._dynamo.reset()

    def squared(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        return grouped_product(rows * 2, weights, ends, backend).square().sum()

    compiled = torch.compile(squared, fullgraph=True, dynamic=False, backend=compiler)
    sizes = ([3, 20, 1, 0, 8], [32, 0, 0, 0, 0])  # of one sum, so of one shape
    with torch._dynamo.config.patch(error_on_recompile=True):
        for load in sizes:
            rows, weights, layout = inputs(backend, load, torch.float32)
            results = []
            for function in (squared, compiled):
                loss = function(rows, weights, layout.ends)
                results.append((loss, *torch.autograd.grad(loss, (rows, weights))))
            torch.testing.assert_close(*results)


def test_a_backend_of_ones_own_and_one_there_is_not() -> None:
    rows, weights, layout = inputs("loop", [2, 2, 0, 0, 1], torch.float32)
    EXPERT_BACKENDS.add("mine", "ultrathink.model.experts.products:Loop")
    found = grouped_product(rows, weights, layout.ends, "mine")
    torch.testing.assert_close(found, reference(rows, weights, layout.ends))
    with pytest.raises(UltrathinkError, match="Did you mean 'loop'"):
        grouped_product(rows, weights, layout.ends, "lopo")
