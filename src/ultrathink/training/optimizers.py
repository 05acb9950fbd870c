"""Optimizers by name, and their state by parameter name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ultrathink.config.optimizer import OPTIMIZERS, AdamWConfig, MuonConfig, OptimizerConfig
from ultrathink.core.errors import CheckpointError, ConfigError, suggestion
from ultrathink.core.protocols import State
from ultrathink.core.shards import TensorShard
from ultrathink.model.experts.layer import Experts
from ultrathink.model.linear import Linear
from ultrathink.parallel.placement import placed_like
from ultrathink.training.muon import Muon

Optimizers = list[torch.optim.Optimizer]
NO_COPIES: Mapping[Tensor, str] = MappingProxyType({})


def build_optimizers(
    config: OptimizerConfig,
    module: nn.Module,
    *,
    lr_factor: float = 1.0,
    weight_decay: float | None = None,
) -> Optimizers:
    """The optimizers of ``config``; each parameter of ``module`` is in exactly one of them.

    ``lr_factor`` multiplies the learning rates, ``weight_decay`` replaces the configured one. The
    list is empty if nothing is trained. Every group stores its peak learning rate (``peak_lr``),
    whether it is decayed (``decayed``) and by how much (``own_decay``); the trainer sets ``lr`` and
    the decay before each step.
    """
    if not any(parameter.requires_grad for parameter in module.parameters()):
        return []
    if weight_decay is not None:
        config = config.model_copy(update={"weight_decay": weight_decay})
    optimizers: Optimizers = OPTIMIZERS.load(config.type)(config, module)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group.get("peak_lr", group["lr"]) * lr_factor
            group.setdefault("decayed", group.get("weight_decay", 0) != 0)
            group["own_decay"] = group.get("weight_decay", 0.0)
    return optimizers


def build_adamw(config: AdamWConfig, model: nn.Module) -> Optimizers:
    """AdamW on every parameter; vectors (norms, biases) are not decayed."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [_adamw(parameters, config.lr, config)]


def build_muon(config: MuonConfig, model: nn.Module) -> Optimizers:
    """Muon on the matrices inside the blocks, AdamW on everything else.

    That is embeddings, head, vectors, experts if so configured, routers and predictors of depth:
    orthogonalization would give all rows, that is all experts, updates of the same size.
    """
    hidden: list[Tensor] = []
    other: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim == 2 or (parameter.ndim == 3 and config.experts == "muon")
            is_hidden = (
                is_matrix
                and name.startswith("blocks.")
                and not any(part in name for part in (".router.", ".depth."))
            )
            (hidden if is_hidden else other).append(parameter)
    optimizers: Optimizers = []
    if hidden:
        muon = Muon(
            hidden,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            num_iterations=config.num_iterations,
            row_splits=_row_splits(model),
        )
        optimizers.append(muon)
    if other:
        optimizers.append(_adamw(other, config.adamw_lr, config))
    return optimizers


def _adamw(
    parameters: Sequence[Tensor], lr: float, config: AdamWConfig | MuonConfig
) -> torch.optim.Optimizer:
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": config.weight_decay, "decayed": True},
        {"params": vectors, "weight_decay": 0.0, "decayed": False},
    ]
    is_fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=lr,
        betas=config.betas,
        eps=config.eps,
        fused=is_fused,
    )


def _row_splits(model: nn.Module) -> dict[Tensor, Sequence[int]]:
    """The row counts of the matrices stacked in fused projections (``Linear.row_splits``)."""
    found: dict[Tensor, Sequence[int]] = {}
    for module in model.modules():
        if isinstance(module, Linear):
            found[module.weight] = module.row_splits
        elif isinstance(module, Experts):
            found |= {p: module.row_splits(name) for name, p in module.named_parameters()}
    return found


# Not options of an optimizer, or set by other settings.
_NO_OPTIONS = ("params", "lr", "peak_lr", "decayed", "own_decay", "weight_decay")


def set_option(optimizers: Optimizers, name: str, value: Any) -> Any:
    """Set an option such as ``betas`` in every group that has it; returns its former value.

    Raises ConfigError if no optimizer has it.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    having = [group for group in groups if name in group and name not in _NO_OPTIONS]
    if not having:
        known = sorted({key for group in groups for key in group} - set(_NO_OPTIONS))
        raise ConfigError(
            f"the optimizer has no option {name!r} that can be set. {suggestion(name, known)}"
        )
    before = having[0][name]
    for group in having:
        group[name] = tuple(value) if isinstance(before, tuple) else value
    return before


@torch.no_grad()
def allocate_state(optimizers: Optimizers) -> None:
    """Give each parameter without a state the zeros that its optimizer starts with.

    Training is the same without this; with it a lack of memory shows before the first batch.
    Other optimizers than Muon and AdamW allocate their state in the first step.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if optimizer.state.get(parameter):
                    continue
                if isinstance(optimizer, Muon):
                    optimizer.state[parameter] = optimizer.zero_state(parameter)
                elif type(optimizer) is torch.optim.AdamW:
                    optimizer.state[parameter] = _adamw_zero_state(parameter, group["fused"])


def _adamw_zero_state(parameter: Tensor, fused: bool) -> dict[str, Tensor]:
    """The initial state of torch's AdamW; the fused one counts steps on the parameter's device."""
    device = parameter.device if fused else torch.device("cpu")
    return {
        "step": torch.zeros((), dtype=torch.float32, device=device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


def optimizer_state(
    optimizers: Optimizers,
    parameters: Mapping[str, nn.Parameter],
    copies: Mapping[Tensor, str] = NO_COPIES,
) -> State:
    """The optimizers' states of ``parameters``, by parameter name.

    ``copies`` maps tensors that are updated in place of parameters to the parameters' names.
    """
    names: dict[Tensor, str] = {p: name for name, p in parameters.items()} | dict(copies)
    return {
        names[parameter]: dict(values)
        for optimizer in optimizers
        for parameter, values in optimizer.state.items()
    }


def load_optimizer_state(
    optimizers: Optimizers,
    parameters: Mapping[str, nn.Parameter],
    state: State,
    copies: Mapping[Tensor, str] = NO_COPIES,
) -> None:
    """Load what ``optimizer_state`` returned; CheckpointError if parameters differ."""
    names: dict[Tensor, str] = {p: name for name, p in parameters.items()} | dict(copies)
    unknown = sorted(set(state) - set(names.values()))
    if unknown:
        raise CheckpointError(
            f"the checkpoint's optimizer has state for {unknown[0]!r}, which this model lacks; "
            f"resume with the configuration it was made with."
        )
    for optimizer in optimizers:
        # torch's format numbers parameters in the order of the groups.
        ordered = [p for group in optimizer.param_groups for p in group["params"]]
        numbered = {
            number: placed_values(state[names[parameter]], parameter)
            for number, parameter in enumerate(ordered)
            if names[parameter] in state
        }
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": numbered, "param_groups": groups})


def placed_values(values: Any, parameter: Tensor, *, is_for_host: bool = False) -> dict[str, Any]:
    """A copy of the optimizer state ``values`` for ``parameter``.

    If ``parameter`` is sharded, tensors with one value for each of its elements are sharded too.
    """
    placed = dict(values)
    for key, value in values.items():
        is_like = isinstance(value, Tensor | TensorShard) and value.shape == tuple(parameter.shape)
        if is_like:
            placed[key] = placed_like(value, parameter, is_for_host=is_for_host)
        # On another device the optimizer copies it.
        is_moved = is_like and isinstance(value, Tensor) and value.device != parameter.device
        if isinstance(value, Tensor) and not is_moved:
            placed[key] = placed[key].clone()
    return placed
