"""The number of weights of a configured model, without building it."""

from __future__ import annotations

from typing import NamedTuple

from ultrathink.config.model import ModelConfig


class Sizes(NamedTuple):
    """Numbers of trained weights."""

    total: int
    active: int
    """Those that a token uses, the lookup in the embedding counted as the head's."""


def sizes(model: ModelConfig) -> Sizes:
    """Trained weights of ``model``, in all and those that one token uses.

    A feed-forward of a plugin is counted as two matrices.
    """
    model = model.resolved()
    hidden, head_dim = model.hidden_size, model.head_dim
    assert model.vocab_size is not None, "the vocabulary is set when a configuration is loaded"
    assert head_dim is not None
    assert model.num_kv_heads is not None
    assert model.intermediate_size is not None
    queries = hidden * model.num_heads * head_dim
    keys_and_values = 2 * hidden * model.num_kv_heads * head_dim
    output = model.num_heads * head_dim * hidden
    norms = 2 * hidden + (2 * head_dim if model.qk_norm else 0)
    biases = (model.num_heads + 2 * model.num_kv_heads) * head_dim if model.qkv_bias else 0
    embeddings = model.vocab_size * hidden * (1 if model.tie_embeddings else 2)
    shared = embeddings + model.num_layers * (queries + keys_and_values + output + norms + biases)
    shared += hidden
    num_dense = model.num_layers - len(model.expert_layers)
    num_matrices = 3 if model.feed_forward == "swiglu" else 2
    shared += num_dense * num_matrices * hidden * model.intermediate_size
    if model.mod is not None and model.mod.strategy == "learned":
        assert model.mod.predictor.hidden_size is not None
        # The router's row, the predictor's two matrices, its scale and its bias.
        own = hidden + model.mod.predictor.hidden_size * (hidden + 1) + 2
        shared += len(model.depth_layers) * own
    exit_norms = len(model.exits_with_norms) * hidden
    if model.moe is None:
        return Sizes(shared + exit_norms, shared)
    assert model.moe.intermediate_size is not None
    expert = num_matrices * hidden * model.moe.intermediate_size
    num_logits = model.moe.num_slots + (len(model.moe.groups) if model.moe.group_gates else 0)
    always = hidden * num_logits + num_matrices * hidden * (model.moe.shared_size or 0)
    num_layers = len(model.expert_layers)
    return Sizes(
        shared + exit_norms + num_layers * (always + model.moe.num_slots * expert),
        shared + num_layers * (always + model.moe.experts_per_token * expert),
    )
