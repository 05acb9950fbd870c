"""Collects the statistics of depth routing in a step for observers."""

from __future__ import annotations

import numpy as np
import torch

from ultrathink.config.depth import EIGHTHS
from ultrathink.model.compute_path import ComputePath
from ultrathink.model.depth.reports import PREFIX
from ultrathink.model.flops import flops_per_token
from ultrathink.model.transformer import Transformer
from ultrathink.monitoring.depth import DepthStatistics
from ultrathink.monitoring.records import Reporter
from ultrathink.parallel.world import Group
from ultrathink.training.stepping import StepResult


def read_depth(model: Transformer, result: StepResult, dp_group: Group) -> DepthStatistics | None:
    """What depth routing did in a step, summed over all processes; all call it.

    None for a model without it.
    """
    layers = model.depth_layers()
    if model.depth is None or f"{PREFIX}selected" not in result.stats:
        return None
    names = [name for name in result.stats if name.startswith(PREFIX)]
    parts = [result.stats[name].double() for name in names]
    sums = dp_group.summed(torch.cat([part.flatten() for part in parts])).cpu()  # one all-reduce
    pieces = sums.split([part.numel() for part in parts])
    found = {
        name.removeprefix(PREFIX): piece.view(part.shape).numpy()
        for name, piece, part in zip(names, pieces, parts, strict=True)
    }
    eighths = model.depth.eighths
    is_learned = all(router.is_learned for router in layers.values())
    thresholds = [router.thresholds[eighths - 1].item() for router in layers.values() if is_learned]
    logits = found.pop("logits")
    seq_len = len(found["at_place"])
    here, whole = (
        flops_per_token(model.config, seq_len, ComputePath(depth=capacity))
        for capacity in (model.depth.capacity, 1.0)
    )
    hits = found.pop("hits")
    return DepthStatistics(
        layers=tuple(layers),
        capacity=model.depth.capacity,
        num_tokens=result.num_tokens,
        flops_saved=1 - here / whole,
        is_by_place=model.depth.config.strategy == "fixed",
        positive=logits[:, eighths - 1] if is_learned and eighths < EIGHTHS else None,
        hits=hits if is_learned and eighths < EIGHTHS else None,
        threshold=np.array(thresholds) if is_learned and eighths < EIGHTHS else None,
        **found,
    )


def follow_schedule(model: Transformer, step: int, total_steps: int, report: Reporter) -> None:
    """Set the capacity of depth routing for ``step`` (from 1); a change of it is reported."""
    if model.depth is None:
        return
    before = model.depth.capacity
    model.depth.begin_step(step, total_steps)
    if model.depth.capacity != before:
        text = f"mod.capacity: {before:g} -> {model.depth.capacity:g} (model.mod.schedule)"
        report(text, "info")
