"""The number of parameters of a model, and of floating point operations per token.

The count of https://arxiv.org/abs/2204.02311, appendix B, with causal attention counted once.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from ultrathink.config.model import ModelConfig
from ultrathink.model.compute_path import ComputePath, path_of
from ultrathink.model.experts.layer import Experts
from ultrathink.model.experts.router import running_groups


class ParameterCounts(NamedTuple):
    """Numbers of parameters; a shared embedding counts once in ``total``."""

    total: int
    matrices: int
    """Parameters used in products for a token: all matrices and the head, without the embedding
    lookup, and of experts only those that the token is sent to."""


def count_parameters(model: nn.Module) -> ParameterCounts:
    """Count the parameters of a ``Transformer``, on any device."""
    total = matrices = 0
    is_tied = True
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        is_tied = is_tied and not name.startswith("head.")
        if parameter.dim() == 2 and not name.startswith("embedding."):
            matrices += parameter.numel()
    for module in model.modules():
        if isinstance(module, Experts):
            matrices += module.per_token * (module.inner[0].numel() + module.down[0].numel())
    if is_tied:
        matrices += model.get_parameter("embedding.weight").numel()
    return ParameterCounts(total, matrices)


def flops_per_token(
    config: ModelConfig, seq_len: int, path: str | ComputePath | None = None
) -> float:
    """Floating point operations of a forward and backward pass for one token of ``seq_len``.

    ``6 * M + 6 * num_layers * num_heads * head_dim * (seq_len + 1)``: M parameters in matrices
    (head included, embedding lookup not; of experts those that a token is sent to) take 2
    operations forward and 4 backward each; a query has (seq_len + 1) / 2 keys on average, used
    twice (scores and values). Only what runs on ``path`` (None: all of the model) counts.
    Recomputation, norms and softmax are not counted. The vocabulary must be set.
    """
    config = config.resolved()
    assert config.vocab_size is not None, "the vocabulary is set before training"
    assert config.num_kv_heads is not None, "the configuration is resolved first"
    assert config.head_dim is not None, "the configuration is resolved first"
    assert config.intermediate_size is not None, "the configuration is resolved first"
    path = path_of(path, config)
    layers = path.indices(config.num_layers)
    attention = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    num_matrices = 3 if config.feed_forward == "swiglu" else 2
    num_expert_layers = len(set(layers) & set(config.expert_layers))
    widths = (len(layers) - num_expert_layers) * num_matrices * config.intermediate_size
    if config.moe is not None:
        assert config.moe.intermediate_size is not None, "the configuration is resolved first"
        running = running_groups(config.moe, path)
        width = sum(group.top_k for group in running) * config.moe.intermediate_size
        width += config.moe.shared_size or 0
        num_logits = sum(group.config.num_slots for group in running)
        if config.moe.group_gates and running:
            num_logits += len(config.moe.groups)
        widths += num_expert_layers * (num_matrices * width + num_logits)
    rows = len(layers) * attention + widths + config.vocab_size
    matrices = config.hidden_size * rows
    heads_width = config.num_heads * config.head_dim
    return 6.0 * matrices + 6.0 * len(layers) * heads_width * (seq_len + 1)
