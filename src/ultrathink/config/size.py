"""How large the model of a configuration is, told without building it."""

from __future__ import annotations

from ultrathink.config.model import ModelConfig


def parameter_count(model: ModelConfig) -> int:
    """Number of trained weights; a feed-forward of your own is counted as two matrices."""
    model = model.resolved()
    hidden, head_dim = model.hidden_size, model.head_dim
    assert model.vocab_size is not None, "the vocabulary is set when a configuration is loaded"
    assert head_dim is not None
    assert model.num_kv_heads is not None
    assert model.intermediate_size is not None
    queries = hidden * model.num_heads * head_dim
    keys_and_values = 2 * hidden * model.num_kv_heads * head_dim
    output = model.num_heads * head_dim * hidden
    num_matrices = 3 if model.feed_forward == "swiglu" else 2
    feed_forward = num_matrices * hidden * model.intermediate_size
    norms = 2 * hidden + (2 * head_dim if model.qk_norm else 0)
    biases = (model.num_heads + 2 * model.num_kv_heads) * head_dim if model.qkv_bias else 0
    layer = queries + keys_and_values + output + feed_forward + norms + biases
    embeddings = model.vocab_size * hidden * (1 if model.tie_embeddings else 2)
    return embeddings + model.num_layers * layer + hidden
