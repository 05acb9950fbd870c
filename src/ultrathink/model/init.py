"""Weight initialization: a truncated normal, smaller for layers that write to the residual stream.

After GPT-2 (https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf,
section 2.3): 2 * num_layers projections add up in the residual stream, so each starts at
std / sqrt(2 * num_layers).
"""

from __future__ import annotations

import torch
from torch import nn

from ultrathink.config.model import ModelConfig
from ultrathink.model.experts.layer import MixtureOfExperts

CUT = 3.0  # in standard deviations
RESIDUAL_WEIGHTS = (
    "attention.output.weight",
    "feed_forward.down.weight",
    "feed_forward.shared.down.weight",
    "feed_forward.experts.down",
)
# A router of depth that chooses by nothing yet, whose gates are all 1, and a predictor that follows
# it; gates of expert groups that are all 1.
ZERO_WEIGHTS = (".depth.router.weight", ".depth.predictor.outer", ".group_gates.weight")


@torch.no_grad()
def init_parameters(
    model: nn.Module, config: ModelConfig, generator: torch.Generator | None = None
) -> None:
    """Set every parameter of ``model``: norms one, biases zero, matrices by ``config.init``.

    Routers of depth are zero, and gates of expert groups, so that all groups begin with the weight
    1. Slots without an expert are zero, so that no optimizer changes them.
    """
    std = config.init.std
    residual_std = 0.0 if config.init.residual == "zero" else std / (2 * config.num_layers) ** 0.5
    for name, parameter in model.named_parameters():
        if name.endswith((".bias", *ZERO_WEIGHTS)):
            nn.init.zeros_(parameter)
        elif parameter.dim() == 1:
            nn.init.ones_(parameter)
        elif not name.endswith(RESIDUAL_WEIGHTS):
            _truncated_normal(parameter, std, generator)
        elif residual_std == 0.0:
            nn.init.zeros_(parameter)
        else:
            _truncated_normal(parameter, residual_std, generator)
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            module.empty_slots()


def _truncated_normal(
    parameter: torch.Tensor, std: float, generator: torch.Generator | None
) -> None:
    nn.init.trunc_normal_(parameter, 0.0, std, -CUT * std, CUT * std, generator=generator)
