"""The first line of a run: its model, data, precision and devices."""

from __future__ import annotations

import torch

from ultrathink.config.schema import Config
from ultrathink.config.size import sizes
from ultrathink.training.choices import Choices


def heading(config: Config, choices: Choices) -> str:
    """Size, data, precision and devices of a run, in one line."""
    counts = sizes(config.model)
    active = f" ({counts.active / 1e6:.1f}M active)" if config.model.moe is not None else ""
    compiled = "compiled" if config.training.compile else "eager"
    sources = ", ".join(source.name or source.type for source in config.data.train)
    return (
        f"{counts.total / 1e6:.1f}M parameters{active} on {sources}; {choices.precision}, "
        f"{compiled}, {choices.device}, {torch.get_num_threads()} threads{_spread(config, choices)}"
    )


def _spread(config: Config, choices: Choices) -> str:
    """How the run is distributed over processes, as text; empty for one."""
    replicate, shard = choices.dims.dp_replicate, choices.dims.dp_shard
    if choices.world.size == 1:
        return ""
    if shard == 1:
        return f", {replicate} processes with a replica each"
    copies = f", {replicate} replicas" if replicate > 1 else ""
    return f"{copies}, {shard} processes by ZeRO-{config.parallel.zero_stage}"
