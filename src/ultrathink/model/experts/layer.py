"""A layer of experts, in place of a feed-forward layer.

``y_n = Σ_k gate_n,k · expert_k(x_n)``, each expert a small feed-forward layer: SwiGLU or squared
ReLU. https://arxiv.org/abs/1701.06538

Shapes: B rows of a batch, T tokens, N = B * T, C hidden size, E experts, K of them for a token, M
width of an expert, R rows of a grouped product (``layout.py``).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultrathink.config.experts import EXPERT_BACKENDS
from ultrathink.config.model import FEED_FORWARDS, ModelConfig
from ultrathink.model.experts.layout import Layout, lay_out, sum_of_rows
from ultrathink.model.experts.products import (
    AUTOMATIC,
    ExpertBackend,
    choose_expert_backend,
    grouped_product,
)
from ultrathink.model.experts.router import (
    Choice,
    LayerRouting,
    Router,
    RoutingPass,
    RunningGroup,
    of_groups,
    running_groups,
)


class MixtureOfExperts(nn.Module):
    """Groups of experts behind one router, and a shared expert if there is one."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.moe is not None, "a layer of experts is configured"
        self.router = Router(config.moe, config.hidden_size)
        self.experts = Experts(config)
        self.shared: nn.Module | None = None
        if config.moe.shared_size is not None:
            width = {"intermediate_size": config.moe.shared_size}
            self.shared = FEED_FORWARDS.load(config.feed_forward)(config.model_copy(update=width))

    @torch.no_grad()
    def empty_slots(self) -> None:
        """Set the weights of slots without an expert to zero."""
        for weight in (self.router.weight, self.experts.inner, self.experts.down):
            weight[~self.router.active] = 0.0

    def forward(self, x: Tensor, routing: RoutingPass) -> tuple[Tensor, LayerRouting | None]:
        """Map ``[B, T, C]`` to ``[B, T, C]``; also returns the routing statistics, if any."""
        running = running_groups(self.router.config, routing.path)
        if not running:
            assert self.shared is not None, "resolved paths compute something in every layer"
            return self.shared(x), None
        choice, report = self.router(x, routing)
        out = self.experts(x.flatten(0, 1), choice, running).view_as(x)
        if self.shared is not None:
            out = out + self.shared(x)
        return out, report


class Experts(nn.Module):
    """The weights of all experts of a layer, including empty slots.

    ``gate_up`` is ``[E, 2M, C]``, rows ``[:M]`` of an expert its gate and ``[M:]`` its up
    projection; squared ReLU has ``up`` ``[E, M, C]`` instead. ``down`` is ``[E, C, M]``.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.moe is not None, "a layer of experts is configured"
        assert config.moe.intermediate_size is not None, "the configuration is resolved first"
        self.num_slots = config.moe.num_slots
        self.per_token = config.moe.experts_per_token
        self.width = config.moe.intermediate_size
        self.backend = config.moe.backend
        names = AUTOMATIC if self.backend == "auto" else (self.backend,)
        self._kernels: dict[str, ExpertBackend] = {
            name: EXPERT_BACKENDS.load(name)() for name in names
        }
        self.is_gated = config.feed_forward == "swiglu"
        inner = 2 * self.width if self.is_gated else self.width
        weight = nn.Parameter(torch.empty(self.num_slots, inner, config.hidden_size))
        self.register_parameter("gate_up" if self.is_gated else "up", weight)
        self.down = nn.Parameter(torch.empty(self.num_slots, config.hidden_size, self.width))

    @property
    def inner(self) -> Tensor:
        """The weight that reads the residual stream."""
        return self.get_parameter("gate_up" if self.is_gated else "up")

    def row_splits(self, name: str) -> tuple[int, ...]:
        """Rows of each matrix stacked in an expert's weight ``name``."""
        return (
            (self.width, self.width) if name == "gate_up" else (self.get_parameter(name).shape[1],)
        )

    def forward(self, x: Tensor, choice: Choice, running: list[RunningGroup]) -> Tensor:
        """Map ``[N, C]`` to ``[N, C]``: each token's experts of the groups that run, times their
        gates, summed."""
        weights = [of_groups(weight, running) for weight in (self.inner, self.down)]
        num_slots = len(weights[0])
        is_few = choice.experts.numel() <= num_slots
        if is_few and not self.training and not torch.is_grad_enabled():  # then none is dropped
            return self._of_few(x, choice, *weights)
        backend = self.backend
        if backend == "auto":
            backend = choose_expert_backend(x.device.type, x.dtype)
        kernel = self._kernels[backend]
        layout = lay_out(
            choice.experts,
            num_slots,
            multiple=kernel.multiple(choice.experts.numel() // num_slots),
            by_size=kernel.by_size,
        )
        rows: Tensor = _Spread.apply(x, layout.place, layout.source)  # type: ignore[no-untyped-call]
        gates: Tensor = _Spread.apply(  # type: ignore[no-untyped-call]
            choice.gates.view(-1, 1), layout.place, layout.source
        )
        inner, down = (_arranged(weight, layout, x.dtype, kernel.by_size) for weight in weights)
        hidden = self.activated(grouped_product(rows, inner, layout.ends, backend))
        # The gate is applied here, where rows are narrower.
        hidden = hidden * gates.to(hidden.dtype)
        out = grouped_product(hidden, down, layout.ends, backend)
        gathered: Tensor = _Gather.apply(  # type: ignore[no-untyped-call]
            out, layout.place, layout.source, len(x)
        )
        return gathered

    def activated(self, hidden: Tensor) -> Tensor:
        """The hidden states of an expert, from its first product."""
        if self.is_gated:
            gate, up = hidden.chunk(2, dim=-1)
            return F.silu(gate) * up
        return F.relu(hidden).square()

    def _of_few(self, x: Tensor, choice: Choice, inner: Tensor, down: Tensor) -> Tensor:
        """Like ``forward``, reading only the chosen experts: for a few tokens, in generation."""
        experts, gates = choice.experts.flatten(), choice.gates.to(x.dtype)
        repeated = x.repeat_interleave(choice.experts.shape[1], 0)[..., None]  # [N * K, C, 1]
        hidden = self.activated((inner[experts].to(x.dtype) @ repeated)[..., 0])
        out = down[experts].to(x.dtype) @ hidden[..., None]  # [N * K, C, 1]
        return (out.view(*gates.shape, x.shape[1]) * gates[..., None]).sum(1)


class _Spread(torch.autograd.Function):
    """Rows ``[R, X]`` of values ``[N, X]`` of tokens, or ``[N * K, X]`` of assignments.

    The gradient is also a gather, and a sum over K, in the same order in every run.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, place: Tensor, source: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.num_values = len(values)
        return _rows(values, place.numel() // len(values), source, place.numel())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        return sum_of_rows(grad_outputs[0], place, ctx.num_values), None, None


class _Gather(torch.autograd.Function):
    """Sums ``[N, X]`` over the rows ``[R, X]`` of each token: the transpose of ``_Spread``."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, place: Tensor, source: Tensor, num_tokens: int) -> Tensor:
        ctx.save_for_backward(source)
        ctx.num_assignments = place.numel()
        ctx.per_token = place.numel() // num_tokens
        return sum_of_rows(rows, place, num_tokens)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (source,) = ctx.saved_tensors
        rows = _rows(grad_outputs[0], ctx.per_token, source, ctx.num_assignments)
        return rows, None, None, None


def _rows(values: Tensor, per_value: int, source: Tensor, num_assignments: int) -> Tensor:
    is_used = (source < num_assignments)[:, None]
    index = source.clamp(max=num_assignments - 1) // per_value
    return torch.where(is_used, values[index], 0.0)


def _arranged(weight: Tensor, layout: Layout, dtype: torch.dtype, by_size: bool) -> Tensor:
    """``weight`` ``[E, O, I]`` in ``dtype``, its experts in the order of ``layout``."""
    if not by_size:
        return weight.to(dtype)
    arranged: Tensor = _Arranged.apply(weight, layout.order, dtype)  # type: ignore[no-untyped-call]
    return arranged


class _Arranged(torch.autograd.Function):
    """A permutation, whose gradient is the inverse permutation."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, order: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(order)
        ctx.dtype = weight.dtype
        return weight[order].to(dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return grad_outputs[0][order.argsort()].to(ctx.dtype), None, None
