"""What a parallel plan needs to know of the parameters, as plain data.

Roles:

- ``vocab``: ``[V, C]``, split by vocabulary rows.
- ``colwise``: ``[O, I]``, outputs are split: rows of the weight (or of a bias ``[O]``).
- ``colwise_qkv``, ``colwise_gate_up``: as colwise, but the rows are several projections one after
  the other (queries, keys, values; gate, up), and each is split by itself.
- ``rowwise``: ``[O, I]``, inputs are split: columns of the weight; partial results are added.
- ``experts``: ``[E, ...]``, split by experts.
- ``replicated``: whole on every rank.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

Role: TypeAlias = Literal[
    "vocab", "colwise", "colwise_qkv", "colwise_gate_up", "rowwise", "experts", "replicated"
]


class ShardingRule(NamedTuple):
    """Parameters whose whole name matches ``pattern``, in the manner of ``fnmatch``."""

    pattern: str
    role: Role


SHARDING_RULES: tuple[ShardingRule, ...] = (
    ShardingRule("embedding.weight", "vocab"),
    ShardingRule("head.weight", "vocab"),
    ShardingRule("blocks.*.attention.qkv.weight", "colwise_qkv"),
    ShardingRule("blocks.*.attention.qkv.bias", "colwise_qkv"),
    ShardingRule("blocks.*.attention.output.weight", "rowwise"),
    ShardingRule("blocks.*.feed_forward.gate_up.weight", "colwise_gate_up"),
    ShardingRule("blocks.*.feed_forward.up.weight", "colwise"),
    ShardingRule("blocks.*.feed_forward.down.weight", "rowwise"),
    ShardingRule("blocks.*.feed_forward.shared.gate_up.weight", "colwise_gate_up"),
    ShardingRule("blocks.*.feed_forward.shared.up.weight", "colwise"),
    ShardingRule("blocks.*.feed_forward.shared.down.weight", "rowwise"),
    ShardingRule("blocks.*.feed_forward.experts.*", "experts"),
    ShardingRule("blocks.*.feed_forward.router.weight", "replicated"),
    ShardingRule("blocks.*.attention.*_norm.weight", "replicated"),
    ShardingRule("blocks.*.attention_norm.weight", "replicated"),
    ShardingRule("blocks.*.feed_forward_norm.weight", "replicated"),
    ShardingRule("norm.weight", "replicated"),
)
