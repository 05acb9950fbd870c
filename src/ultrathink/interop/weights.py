"""Where each weight of a Hugging Face checkpoint lies in our parameters.

Our model fuses weights that are multiplied with the same input: queries, keys and values; gate and
up; and the experts of a layer. Each Hugging Face tensor is therefore a slice of the rows of one of
our parameters, or of one expert's part of it: splitting and joining are exact.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, NamedTuple

from ultrathink.config.model import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


class RowSlice(NamedTuple):
    """The Hugging Face tensor ``theirs``: rows ``begin`` to ``end`` of the parameter ``ours``."""

    theirs: str
    ours: str
    begin: int
    end: int
    row: tuple[int, ...]
    """The shape of each row; empty for a vector."""

    expert: int | None = None
    """The expert that the rows belong to, in a parameter of all experts."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.end - self.begin, *self.row)

    def of(self, parameter: Tensor) -> Tensor:
        """The slice of ``parameter``, as a view."""
        rows = parameter if self.expert is None else parameter[self.expert]
        return rows[self.begin : self.end]


class ExpertNames(NamedTuple):
    """The names of expert tensors in a checkpoint."""

    place: str
    is_fused: bool  # one tensor for all experts, not three for each


WRITTEN = ExpertNames("block_sparse_moe", is_fused=False)  # every version of transformers reads it


def expert_names(tensors: Collection[str]) -> ExpertNames:
    """The names in a checkpoint that holds ``tensors``; transformers 5 has two layouts."""
    is_newer = any(".mlp.gate." in name or ".mlp.experts." in name for name in tensors)
    is_fused = any(name.endswith(".experts.gate_up_proj") for name in tensors)
    return ExpertNames("mlp" if is_newer else WRITTEN.place, is_fused)


def row_slices(config: ModelConfig, names: ExpertNames = WRITTEN) -> list[RowSlice]:
    """Every tensor of a Hugging Face checkpoint for ``config``; together they cover our parameters.

    Slots without an expert are left out: they are zero.
    """
    config = config.resolved()
    assert config.vocab_size is not None, "a checkpoint has a vocabulary"
    hidden, vocabulary = config.hidden_size, config.vocab_size
    found = [
        RowSlice(EMBEDDING, "embedding.weight", 0, vocabulary, (hidden,)),
        RowSlice("model.norm.weight", "norm.weight", 0, hidden, ()),
    ]
    if not config.tie_embeddings:
        found.append(RowSlice(HEAD, "head.weight", 0, vocabulary, (hidden,)))
    for layer in range(config.num_layers):
        theirs, ours = f"model.layers.{layer}.", f"blocks.{layer}."
        found.extend(_attention(config, f"{theirs}self_attn.", f"{ours}attention."))
        if config.moe is None:
            found.extend(_feed_forward(config, f"{theirs}mlp.", f"{ours}feed_forward."))
        else:
            assert layer in config.expert_layers, "check_mixtral refuses other models"
            found.extend(_experts(config, names, theirs, f"{ours}feed_forward."))
        for name, norm in (
            ("input_layernorm", "attention_norm"),
            ("post_attention_layernorm", "feed_forward_norm"),
        ):
            found.append(RowSlice(f"{theirs}{name}.weight", f"{ours}{norm}.weight", 0, hidden, ()))
    return found


def _attention(config: ModelConfig, theirs: str, ours: str) -> Iterator[RowSlice]:
    assert config.head_dim is not None, "the configuration is resolved first"
    assert config.num_kv_heads is not None, "the configuration is resolved first"
    hidden = config.hidden_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    rows = {"q": (0, queries), "k": (queries, queries + keys)}
    rows["v"] = (queries + keys, queries + 2 * keys)
    for name, (begin, end) in rows.items():
        yield RowSlice(f"{theirs}{name}_proj.weight", f"{ours}qkv.weight", begin, end, (hidden,))
        if config.qkv_bias:
            yield RowSlice(f"{theirs}{name}_proj.bias", f"{ours}qkv.bias", begin, end, ())
    yield RowSlice(f"{theirs}o_proj.weight", f"{ours}output.weight", 0, hidden, (queries,))
    if config.qk_norm:
        for name, norm in (("q_norm", "query_norm"), ("k_norm", "key_norm")):
            yield RowSlice(f"{theirs}{name}.weight", f"{ours}{norm}.weight", 0, config.head_dim, ())


def _feed_forward(config: ModelConfig, theirs: str, ours: str) -> Iterator[RowSlice]:
    assert config.intermediate_size is not None, "the configuration is resolved first"
    hidden, width = config.hidden_size, config.intermediate_size
    gate_up = f"{ours}gate_up.weight"
    yield RowSlice(f"{theirs}gate_proj.weight", gate_up, 0, width, (hidden,))
    yield RowSlice(f"{theirs}up_proj.weight", gate_up, width, 2 * width, (hidden,))
    yield RowSlice(f"{theirs}down_proj.weight", f"{ours}down.weight", 0, hidden, (width,))


def _experts(config: ModelConfig, names: ExpertNames, theirs: str, ours: str) -> Iterator[RowSlice]:
    assert config.moe is not None, "a layer of experts is configured"
    assert config.moe.intermediate_size is not None, "the configuration is resolved first"
    hidden, width = config.hidden_size, config.moe.intermediate_size
    (group,) = config.moe.groups
    number = group.num_experts
    place, gate_up, down = (
        f"{theirs}{names.place}.",
        f"{ours}experts.gate_up",
        f"{ours}experts.down",
    )
    yield RowSlice(f"{place}gate.weight", f"{ours}router.weight", 0, number, (hidden,))
    if names.is_fused:
        yield RowSlice(f"{place}experts.gate_up_proj", gate_up, 0, number, (2 * width, hidden))
        yield RowSlice(f"{place}experts.down_proj", down, 0, number, (hidden, width))
        return
    for expert in range(number):
        of = f"{place}experts.{expert}."
        yield RowSlice(f"{of}w1.weight", gate_up, 0, width, (hidden,), expert)
        yield RowSlice(f"{of}w3.weight", gate_up, width, 2 * width, (hidden,), expert)
        yield RowSlice(f"{of}w2.weight", down, 0, hidden, (width,), expert)
