"""Models with depth routing to test, whose routers and predictors have opinions."""

from __future__ import annotations

from typing import Any

import torch

from ultrathink.model.transformer import Transformer

SCOPES = ("feed_forward", "block")
STRATEGIES = ("learned", "fixed", "random")


def routed_model(make_model: Any, *, moe: Any = None, **mod: Any) -> Transformer:
    """A tiny model in float64, half of whose tokens pass each layer by, also in evaluation."""
    section = {"layers": "all", "capacity": 0.5, **mod}
    model: Transformer = make_model(mod=section, moe=moe, dtype=torch.float64)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for router in model.depth_layers().values():
            for name, parameter in router.named_parameters():
                size = 0.1 if name.endswith("inner") else 0.5
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(drawn, alpha=size)
            if router.is_learned:
                router.thresholds.copy_(torch.linspace(3.0, -3.0, 8))
    return model
