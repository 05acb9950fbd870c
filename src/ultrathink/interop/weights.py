"""The weights of a model under Hugging Face's names, and where each lies in ours.

Ours fuses what is multiplied with the same input: queries, keys and values; gate and up. Each of
their tensors is a run of rows of one of ours, so splitting and joining lose nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ultrathink.config.model import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


class Piece(NamedTuple):
    """One tensor of theirs: the rows from ``begin`` up to ``end`` of the parameter ``ours``."""

    theirs: str
    ours: str
    begin: int
    end: int
    columns: int | None  # None for a vector

    @property
    def shape(self) -> tuple[int, ...]:
        rows = self.end - self.begin
        return (rows,) if self.columns is None else (rows, self.columns)


def pieces(config: ModelConfig) -> list[Piece]:
    """Every tensor of a checkpoint of Hugging Face for ``config``; each parameter is covered."""
    config = config.resolved()
    assert config.vocab_size is not None, "a checkpoint has a vocabulary"
    hidden, vocabulary = config.hidden_size, config.vocab_size
    found = [
        Piece(EMBEDDING, "embedding.weight", 0, vocabulary, hidden),
        Piece("model.norm.weight", "norm.weight", 0, hidden, None),
    ]
    if not config.tie_embeddings:
        found.append(Piece(HEAD, "head.weight", 0, vocabulary, hidden))
    for layer in range(config.num_layers):
        found.extend(_of_layer(config, f"model.layers.{layer}.", f"blocks.{layer}."))
    return found


def _of_layer(config: ModelConfig, theirs: str, ours: str) -> Iterator[Piece]:
    assert config.head_dim is not None, "the configuration is resolved first"
    assert config.num_kv_heads is not None, "the configuration is resolved first"
    assert config.intermediate_size is not None, "the configuration is resolved first"
    hidden, width = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    rows = {"q": (0, queries), "k": (queries, queries + keys)}
    rows["v"] = (queries + keys, queries + 2 * keys)
    for name, (begin, end) in rows.items():
        place, qkv = f"{theirs}self_attn.{name}_proj", f"{ours}attention.qkv"
        yield Piece(f"{place}.weight", f"{qkv}.weight", begin, end, hidden)
        if config.qkv_bias:
            yield Piece(f"{place}.bias", f"{qkv}.bias", begin, end, None)
    output = f"{ours}attention.output.weight"
    yield Piece(f"{theirs}self_attn.o_proj.weight", output, 0, hidden, queries)
    if config.qk_norm:
        for name, norm in (("q_norm", "query_norm"), ("k_norm", "key_norm")):
            place = f"{ours}attention.{norm}.weight"
            yield Piece(f"{theirs}self_attn.{name}.weight", place, 0, config.head_dim, None)
    gate_up = f"{ours}feed_forward.gate_up.weight"
    yield Piece(f"{theirs}mlp.gate_proj.weight", gate_up, 0, width, hidden)
    yield Piece(f"{theirs}mlp.up_proj.weight", gate_up, width, 2 * width, hidden)
    down = f"{ours}feed_forward.down.weight"
    yield Piece(f"{theirs}mlp.down_proj.weight", down, 0, hidden, width)
    for name, norm in (
        ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "feed_forward_norm"),
    ):
        yield Piece(f"{theirs}{name}.weight", f"{ours}{norm}.weight", 0, hidden, None)
