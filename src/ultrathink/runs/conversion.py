"""Fits the weights of a run to a model with experts that has other slots, or had no experts.

- Other slots: experts keep their slots if there are as many or more, and move together if there
  are fewer. Which ones are there follows from the checkpoint, layer by layer.
- Upcycling (https://arxiv.org/abs/2212.05055): every expert becomes a copy of the dense layer in
  its place. The gates of a group sum to 1, so with G groups the copies are divided by G and by
  ``gate_scale``, and the model computes the same; a shared expert starts with an output of zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ultrathink.config.experts import ExpertGroupConfig, MoeConfig
from ultrathink.config.model import ModelConfig
from ultrathink.core.errors import ConfigError
from ultrathink.model.transformer import Transformer
from ultrathink.runs.loading import (
    check_fit,
    check_groups,
    model_config_of,
    read_weights,
    shapes_of,
)

Weights = dict[str, Tensor]
Conversion = Callable[[Weights, Transformer], Weights]


def load_fitted(model: Transformer, folder: Path) -> None:
    """Load the weights of a checkpoint into ``model``, which may have other slots for experts, or
    experts where the checkpoint has none.

    Raises CheckpointError if they do not fit, and ConfigError if they cannot be made to.
    """
    convert = conversion(model_config_of(folder), model.config)
    found = read_weights(folder)
    if convert is None:
        check_groups(model.config.moe, folder)
    else:
        found = convert(found, model)
    check_fit(shapes_of(model.state_dict()), shapes_of(found), folder)
    model.load_state_dict(found)


def conversion(theirs: ModelConfig | None, ours: ModelConfig) -> Conversion | None:
    """How weights of a model ``theirs`` become those of ``ours``; None: as they are.

    Raises ConfigError naming the value of ``ours`` that makes it impossible.
    """
    if theirs is None or ours.moe is None:
        return None
    theirs, ours = theirs.resolved(), ours.resolved()
    assert ours.moe is not None, "it has experts"
    if theirs.moe is None:
        _check_upcycling(theirs, ours, ours.moe)
        return lambda found, model: _upcycled(found, model)
    before, after = theirs.moe.groups, ours.moe.groups
    if len(before) != len(after) or _slots(theirs.moe) == _slots(ours.moe):
        return None
    return lambda found, model: _with_other_slots(found, before, model)


# -- other slots -----------------------------------------------------------------------------------


def _slots(moe: MoeConfig) -> list[int]:
    return [group.num_slots for group in moe.groups]


def _with_other_slots(
    found: Weights, before: tuple[ExpertGroupConfig, ...], model: Transformer
) -> Weights:
    moved = dict(found)
    for layer, experts in model.expert_layers().items():
        place = f"blocks.{layer}.feed_forward."
        router = f"{place}router."
        active, branch = found[f"{router}active"], found[f"{router}branch"]
        rows, columns = _moves(active, branch, before, model, layer)
        for name in [name for name in found if name.startswith((router, f"{place}experts."))]:
            value = found[name]
            to_there = columns if name == f"{router}side" else rows
            moved[name] = value.new_zeros(experts.router.config.num_slots, *value.shape[1:])
            for there, here in to_there:
                moved[name][here] = value[there]
        square = branch.new_zeros(experts.router.branch.shape)
        for there, here in rows:
            for split, column in columns:
                square[here, column] = branch[there, split]
        moved[f"{router}branch"] = square
    return moved


def _moves(
    active: Tensor,
    branch: Tensor,
    before: tuple[ExpertGroupConfig, ...],
    model: Transformer,
    layer: int,
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """From where to where the slots of a layer move, and its splits."""
    rows: list[tuple[int, int]] = []
    columns: list[tuple[int, int]] = []
    first = 0
    groups = model.expert_layers()[layer].router.groups()
    for number, (old, (new, slots)) in enumerate(zip(before, groups, strict=True)):
        mine = range(first, first := first + old.num_slots)
        there = [slot for slot in mine if active[slot]]
        if new.num_experts not in (old.num_experts, len(there)):
            raise ConfigError(
                f"model.moe.groups.{number}.num_experts is {new.num_experts}, but the weights of "
                f"training.init_from have {len(there)} experts of group {old.name!r} in layer "
                f"{layer}; set it to {old.num_experts}, and max_experts for empty slots, which "
                f"AddExpert fills."
            )
        if len(there) > new.num_slots:
            raise ConfigError(
                f"model.moe.groups.{number} has {new.num_slots} slots, but the weights of "
                f"training.init_from have {len(there)} experts of group {old.name!r} in layer "
                f"{layer}; set max_experts={len(there)} or more."
            )
        used = [slot for slot in mine if branch[:, slot].any()]
        kept = (list(mine), list(mine)) if new.num_slots >= old.num_slots else (there, used)
        for moves, old_ones in zip((rows, columns), kept, strict=True):
            moves += [(one, slots.start + count) for count, one in enumerate(old_ones)]
    return rows, columns


# -- from a dense model ----------------------------------------------------------------------------


def _check_upcycling(theirs: ModelConfig, ours: ModelConfig, moe: MoeConfig) -> None:
    for problem, remedy in _problems(theirs, ours, moe):
        raise ConfigError(
            f"training.init_from names a model without experts, whose feed-forward layers become "
            f"experts only where gates sum to 1, but {problem}; set {remedy}."
        )


def _problems(theirs: ModelConfig, ours: ModelConfig, moe: MoeConfig) -> Iterator[tuple[str, str]]:
    if moe.intermediate_size != theirs.intermediate_size:
        what = f"model.moe.intermediate_size is {moe.intermediate_size}, not that of the copies"
        yield what, f"model.moe.intermediate_size={theirs.intermediate_size}"
    if ours.feed_forward != theirs.feed_forward:
        what = f"model.feed_forward is {ours.feed_forward}, and there it is {theirs.feed_forward}"
        yield what, f"model.feed_forward={theirs.feed_forward}"
    for number, group in enumerate(moe.groups):
        sums_all = moe.score == "softmax" and group.top_k == group.num_experts
        if sums_all or (moe.normalize_gates and group.top_k > 1):
            continue
        if group.top_k == 1:
            what = f"group {group.name!r} has top_k = 1, whose gate is a probability"
            yield what, f"model.moe.groups.{number}.top_k=2"
        yield "model.moe.normalize_gates is false", "model.moe.normalize_gates=true"


def _upcycled(found: Weights, model: Transformer) -> Weights:
    """Routers keep the values of ``model``."""
    made, own = dict(found), model.state_dict()
    made |= {name: value for name, value in own.items() if name.startswith("routing.")}
    for layer, experts in model.expert_layers().items():
        moe, place = experts.router.config, f"blocks.{layer}.feed_forward."
        inner = "gate_up" if experts.experts.is_gated else "up"
        dense = {name: made.pop(f"{place}{name}.weight") for name in (inner, "down")}
        made |= {name: value for name, value in own.items() if name.startswith(place)}
        dense["down"] = dense["down"] / (len(moe.groups) * moe.gate_scale)
        for name, weight in dense.items():
            copies = torch.zeros_like(own[f"{place}experts.{name}"])
            copies[experts.router.active] = weight.to(copies)
            made[f"{place}experts.{name}"] = copies
        if experts.shared is not None:
            shared = f"{place}shared.down.weight"
            made[shared] = torch.zeros_like(own[shared])
    return made
