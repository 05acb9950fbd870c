"""The weights of a model under Hugging Face's names, and where each lies in ours.

Ours fuses what is multiplied with the same input: queries, keys and values; gate and up; and the
experts of a layer. Each of their tensors is a run of rows of one of ours, or of one expert's part
of it, so splitting and joining lose nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, NamedTuple

from ultrathink.config.model import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


class Piece(NamedTuple):
    """One tensor of theirs: the rows from ``begin`` up to ``end`` of the parameter ``ours``."""

    theirs: str
    ours: str
    begin: int
    end: int
    row: tuple[int, ...]
    """The shape of each row: nothing for a vector."""

    expert: int | None = None
    """The expert whose rows they are, in a parameter of all experts."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.end - self.begin, *self.row)

    def of(self, parameter: Tensor) -> Tensor:
        """Where the tensor lies in ``parameter``, a view."""
        rows = parameter if self.expert is None else parameter[self.expert]
        return rows[self.begin : self.end]


class ExpertNames(NamedTuple):
    """How a checkpoint calls the tensors of experts."""

    place: str
    is_fused: bool  # one tensor for all experts, not three for each


WRITTEN = ExpertNames("block_sparse_moe", is_fused=False)  # which every transformers reads


def expert_names(tensors: Collection[str]) -> ExpertNames:
    """The names in a checkpoint that holds ``tensors``; inside transformers 5 they are others."""
    is_newer = any(".mlp.gate." in name or ".mlp.experts." in name for name in tensors)
    is_fused = any(name.endswith(".experts.gate_up_proj") for name in tensors)
    return ExpertNames("mlp" if is_newer else WRITTEN.place, is_fused)


def pieces(config: ModelConfig, names: ExpertNames = WRITTEN) -> list[Piece]:
    """Every tensor of a checkpoint of Hugging Face for ``config``; each parameter is covered.

    Slots without an expert, which are zero, are not.
    """
    config = config.resolved()
    assert config.vocab_size is not None, "a checkpoint has a vocabulary"
    hidden, vocabulary = config.hidden_size, config.vocab_size
    found = [
        Piece(EMBEDDING, "embedding.weight", 0, vocabulary, (hidden,)),
        Piece("model.norm.weight", "norm.weight", 0, hidden, ()),
    ]
    if not config.tie_embeddings:
        found.append(Piece(HEAD, "head.weight", 0, vocabulary, (hidden,)))
    for layer in range(config.num_layers):
        theirs, ours = f"model.layers.{layer}.", f"blocks.{layer}."
        found.extend(_attention(config, f"{theirs}self_attn.", f"{ours}attention."))
        if config.moe is None:
            found.extend(_feed_forward(config, f"{theirs}mlp.", f"{ours}feed_forward."))
        else:
            assert layer in config.expert_layers, "what cannot be exported was refused"
            found.extend(_experts(config, names, theirs, f"{ours}feed_forward."))
        for name, norm in (
            ("input_layernorm", "attention_norm"),
            ("post_attention_layernorm", "feed_forward_norm"),
        ):
            found.append(Piece(f"{theirs}{name}.weight", f"{ours}{norm}.weight", 0, hidden, ()))
    return found


def _attention(config: ModelConfig, theirs: str, ours: str) -> Iterator[Piece]:
    assert config.head_dim is not None, "the configuration is resolved first"
    assert config.num_kv_heads is not None, "the configuration is resolved first"
    hidden = config.hidden_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    rows = {"q": (0, queries), "k": (queries, queries + keys)}
    rows["v"] = (queries + keys, queries + 2 * keys)
    for name, (begin, end) in rows.items():
        yield Piece(f"{theirs}{name}_proj.weight", f"{ours}qkv.weight", begin, end, (hidden,))
        if config.qkv_bias:
            yield Piece(f"{theirs}{name}_proj.bias", f"{ours}qkv.bias", begin, end, ())
    yield Piece(f"{theirs}o_proj.weight", f"{ours}output.weight", 0, hidden, (queries,))
    if config.qk_norm:
        for name, norm in (("q_norm", "query_norm"), ("k_norm", "key_norm")):
            yield Piece(f"{theirs}{name}.weight", f"{ours}{norm}.weight", 0, config.head_dim, ())


def _feed_forward(config: ModelConfig, theirs: str, ours: str) -> Iterator[Piece]:
    assert config.intermediate_size is not None, "the configuration is resolved first"
    hidden, width = config.hidden_size, config.intermediate_size
    gate_up = f"{ours}gate_up.weight"
    yield Piece(f"{theirs}gate_proj.weight", gate_up, 0, width, (hidden,))
    yield Piece(f"{theirs}up_proj.weight", gate_up, width, 2 * width, (hidden,))
    yield Piece(f"{theirs}down_proj.weight", f"{ours}down.weight", 0, hidden, (width,))


def _experts(config: ModelConfig, names: ExpertNames, theirs: str, ours: str) -> Iterator[Piece]:
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
    yield Piece(f"{place}gate.weight", f"{ours}router.weight", 0, number, (hidden,))
    if names.is_fused:
        yield Piece(f"{place}experts.gate_up_proj", gate_up, 0, number, (2 * width, hidden))
        yield Piece(f"{place}experts.down_proj", down, 0, number, (hidden, width))
        return
    for expert in range(number):
        of = f"{place}experts.{expert}."
        yield Piece(f"{of}w1.weight", gate_up, 0, width, (hidden,), expert)
        yield Piece(f"{of}w3.weight", gate_up, width, 2 * width, (hidden,), expert)
        yield Piece(f"{of}w2.weight", down, 0, hidden, (width,), expert)
