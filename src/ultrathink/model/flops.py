"""The number of parameters of a model, and of floating point operations per token.

The count of https://arxiv.org/abs/2204.02311, appendix B, with causal attention counted once.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import nn

from ultrathink.config.depth import EIGHTHS, eighths_of
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
    Of layers that tokens may pass by it is the configured share, or that of the path, rounded up
    to whole tokens. Recomputation, norms and softmax are not counted. The vocabulary must be set.
    """
    config = config.resolved()
    assert config.vocab_size is not None, "the vocabulary is set before training"
    assert config.num_kv_heads is not None, "the configuration is resolved first"
    assert config.head_dim is not None, "the configuration is resolved first"
    assert config.intermediate_size is not None, "the configuration is resolved first"
    path = path_of(path, config)
    layers = path.indices(config.num_layers)
    shares = _depth_shares(config, path, layers, seq_len)
    # Of attention: tokens that have queries, keys and values.
    present = shares if config.mod is not None and config.mod.scope == "block" else {}
    attention = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    num_matrices = 3 if config.feed_forward == "swiglu" else 2
    dense, sparse = num_matrices * config.intermediate_size, 0
    if config.moe is not None:
        assert config.moe.intermediate_size is not None, "the configuration is resolved first"
        running = running_groups(config.moe, path)
        width = sum(group.top_k for group in running) * config.moe.intermediate_size
        width += config.moe.shared_size or 0
        num_slots = sum(group.config.num_slots for group in running)
        if config.moe.group_gates and running:
            num_slots += len(config.moe.groups)
        sparse = num_matrices * width + num_slots
    experts = set(config.expert_layers)
    rows, pairs = float(config.vocab_size), 0.0
    for layer in layers:
        share = present.get(layer, 1.0)
        rows += share * attention
        rows += shares.get(layer, 1.0) * (sparse if layer in experts else dense)
        pairs += share * (share * seq_len + 1)
    heads_width = config.num_heads * config.head_dim
    total = 6.0 * config.hidden_size * rows + 6.0 * heads_width * pairs
    return total + len(shares) * _choosing(config, path)


def _depth_shares(
    config: ModelConfig, path: ComputePath, layers: tuple[int, ...], seq_len: int
) -> dict[int, float]:
    """The share of the tokens that go through each of ``layers`` with depth routing."""
    if config.mod is None:
        return {}
    eighths = config.mod.eighths if path.depth is None else eighths_of(path.depth)
    share = math.ceil(eighths * seq_len / EIGHTHS) / seq_len
    return {layer: share for layer in layers if layer in config.depth_layers}


def _choosing(config: ModelConfig, path: ComputePath) -> float:
    """Operations of a router and its predictor for a token; the predictor's input has no
    gradient, and at another capacity than that of training it is not trained."""
    if config.mod is None or config.mod.strategy != "learned":
        return 0.0
    width = config.mod.predictor.hidden_size
    assert width is not None, "the configuration is resolved first"
    inner, outer = (4, 6) if path.depth is None else (2, 2)
    return config.hidden_size * (6.0 + inner * width) + outer * width
