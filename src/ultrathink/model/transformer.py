"""The decoder. https://arxiv.org/abs/2302.13971

Shapes: B batch, T tokens, S keys (T and those in a cache), C hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultrathink.config.model import ATTENTION_BACKENDS, FEED_FORWARDS, ModelConfig
from ultrathink.core.errors import ConfigError
from ultrathink.core.layers import layer_index
from ultrathink.model.activation_checkpointing import (
    CheckpointingMode,
    check_mode,
    run_checkpointed,
)
from ultrathink.model.attention import Attention
from ultrathink.model.attention_backends import READS_DOCUMENTS, AttentionBackend
from ultrathink.model.attention_mask import AttentionMask, build_mask
from ultrathink.model.cache import CacheView, ContiguousCache
from ultrathink.model.compute_path import ComputePath, path_of
from ultrathink.model.embedding import Embedding
from ultrathink.model.experts.balance import LOSSES
from ultrathink.model.experts.controls import RoutingControls
from ultrathink.model.experts.layer import MixtureOfExperts
from ultrathink.model.experts.router import LayerRouting, RoutingPass
from ultrathink.model.experts.sequences import find_sequences
from ultrathink.model.init import init_parameters
from ultrathink.model.linear import Linear
from ultrathink.model.loss import IGNORED_LABEL, linear_cross_entropy
from ultrathink.model.norm import RMSNorm
from ultrathink.model.output import ModelOutput
from ultrathink.model.rope import RotaryEmbedding

# A replacement of logits and loss: from the normalized states [B, T, C], the output projection
# [V, C] and the labels [B, T], if any, it computes tensors by name.
Head = Callable[[Tensor, Tensor, Tensor | None], dict[str, Tensor]]


class Block(nn.Module):
    """Attention and a feed-forward layer, each with a norm before and a residual connection."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.has_experts = layer in config.expert_layers
        self.feed_forward = (
            MixtureOfExperts(config)
            if self.has_experts
            else FEED_FORWARDS.load(config.feed_forward)(config)
        )

    def forward(
        self,
        x: Tensor,
        cos_sin: Tensor,
        mask: AttentionMask | None,
        backend: AttentionBackend,
        cache: CacheView | None,
        routed: RoutingPass | None = None,
    ) -> tuple[Tensor, LayerRouting | None]:
        """Map the residual stream ``[B, T, C]`` to ``[B, T, C]``; also returns routing statistics.

        A block with experts needs ``routed``.
        """
        x = self.attend(x, cos_sin, mask, backend, cache)
        fed, routing = self.feed_forward_norm(x), None
        if self.has_experts:
            assert routed is not None, "experts need sequences, controls and a path"
            fed, routing = self.feed_forward(fed, routed)
        else:
            fed = self.feed_forward(fed)
        return x + F.dropout(fed, self.dropout, self.training), routing

    def attend(
        self,
        x: Tensor,
        cos_sin: Tensor,
        mask: AttentionMask | None,
        backend: AttentionBackend,
        cache: CacheView | None,
    ) -> Tensor:
        """The first half of ``forward``: attention, added to the residual stream."""
        attended = self.attention(self.attention_norm(x), cos_sin, mask, backend, cache)
        return x + F.dropout(attended, self.dropout, self.training)

    def hook_free_parts(self) -> list[tuple[nn.Module, str]]:
        """The largest methods that call no sharded module of their own: modules and names.

        Experts are sharded by themselves, so that a path without them does not gather them.
        """
        if not isinstance(self.feed_forward, MixtureOfExperts):
            return [(self, "forward")]
        parts: list[tuple[nn.Module, str]] = [(self, "attend")]
        inside = (self.feed_forward.router, self.feed_forward.experts, self.feed_forward.shared)
        return parts + [(module, "forward") for module in inside if module is not None]


class Transformer(nn.Module):
    """A Llama-class decoder built from a configuration with a vocabulary.

    ``compute_dtype`` is the precision of activations and products; None is that of the weights.
    Raises ConfigError if ``vocab_size`` is not set.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config.resolved()
        if self.config.vocab_size is None:
            raise ConfigError(
                "model.vocab_size is not set; it follows from the tokenizer, or set it yourself."
            )
        self.compute_dtype: torch.dtype | None = None
        self.activation_checkpointing: CheckpointingMode = "none"
        self.embedding = Embedding(self.config.vocab_size, self.config.hidden_size)
        self.blocks = nn.ModuleList(
            Block(self.config, layer) for layer in range(self.config.num_layers)
        )
        self.norm = RMSNorm(self.config.hidden_size, self.config.norm_eps)
        self.head: Linear | None = None
        if not self.config.tie_embeddings:
            self.head = Linear(self.config.hidden_size, self.config.vocab_size)
        self.rope = RotaryEmbedding(self.config)
        self.routing = RoutingControls(self.config.moe) if self.config.moe is not None else None
        self.set_attention_backend(self.config.attention.backend)
        if not self.embedding.weight.is_meta:
            self.init_weights()

    @property
    def head_weight(self) -> Tensor:
        """The output projection ``[V, C]``, which may be the embedding."""
        return self.embedding.weight if self.head is None else self.head.weight

    @property
    def dtype(self) -> torch.dtype:
        """The precision of activations."""
        return self.compute_dtype or self.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        loss_weights: Tensor | None = None,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        lengths: Sequence[int] | None = None,
        cache: CacheView | None = None,
        path: str | ComputePath | None = None,
        last_only: bool = False,
        head: Head | None = None,
        tap: Sequence[int | float] = (),
        group_targets: Tensor | None = None,
    ) -> ModelOutput:
        """Logits ``[B, T, V]``, or with ``labels`` the summed loss without storing the logits.

        ``input_ids``, ``labels`` (the target of each position, -100 for untrained ones),
        ``loss_weights`` (of each target; None: 1) and ``document_ids`` are ``[B, T]``. The first
        ``lengths[b]`` tokens of a row are real (None: all), the rest is padding: a cache does not
        keep it, and its logits are meaningless.
        ``positions`` is ``[T]`` or ``[B, T]`` and counts from each sequence's length in the cache
        when None. ``attention_mask`` is boolean (True = attend) or additive, ``[B, S]`` or
        broadcastable to ``[B, H, T, S]``. ``last_only`` gives the logits ``[B, 1, V]`` of each
        row's last real token. ``path`` is a part of the model, or the name of one: None is all of
        it. ``head`` replaces logits and loss; it runs inside this pass, where
        sharded weights are gathered. ``tap`` names layers, by index or by fraction, whose residual
        states ``[B, T, C]`` are returned too. ``group_targets``, boolean ``[B, T, G]``, are the
        expert groups that each token belongs to, for the loss of the group gates. Raises ValueError
        for shapes that do not fit, and for layers, groups and paths that do not exist.
        """
        of_tokens = {"labels": labels, "loss_weights": loss_weights, "document_ids": document_ids}
        _check_shapes(input_ids, of_tokens, positions, lengths, cache)
        if lengths is not None and min(lengths) == input_ids.shape[1]:
            lengths = None  # there is no padding
        _check_group_targets(group_targets, input_ids, self.config)
        path = path_of(path, self.config)
        mask, cos_sin = self._mask_and_rotation(
            input_ids, attention_mask, positions, document_ids, lengths, cache, path
        )
        x = self.embedding(input_ids).to(self.dtype)
        x = F.dropout(x, self.config.dropout, self.training)
        recompute = torch.is_grad_enabled() and cache is None
        mode: CheckpointingMode = self.activation_checkpointing if recompute else "none"
        routed = None
        if self.routing is not None:
            sequences = find_sequences(labels, document_ids, x, IGNORED_LABEL, lengths)
            routed = RoutingPass(sequences, self.routing.now(), path, group_targets)
        routings: list[LayerRouting] = []
        taps = {layer_index(layer, self.config.num_layers, "tap") for layer in tap}
        tapped: dict[int, Tensor] = {}
        for layer in path.indices(self.config.num_layers):
            x, routing = run_checkpointed(
                mode, self.blocks[layer], x, cos_sin, mask, self._backend, cache, routed
            )
            if routing is not None:
                routings.append(routing)
            if layer in taps:
                tapped[layer] = x
        if cache is not None:
            cache.commit()
        losses, stats = _reported(routings)
        beside = ModelOutput(
            aux_losses={} if labels is None else losses, stats=stats, tapped=tapped
        )
        x = self.norm(_last(x, lengths) if last_only else x)
        return self._output(x, labels, loss_weights, head, beside)

    def _output(
        self,
        x: Tensor,
        labels: Tensor | None,
        loss_weights: Tensor | None,
        head: Head | None,
        beside: ModelOutput,
    ) -> ModelOutput:
        """``beside`` with logits or loss, computed from the normalized states ``x``."""
        if head is not None:
            return beside._replace(head=head(x, self.head_weight, labels))
        if labels is None:
            return beside._replace(logits=F.linear(x, self.head_weight.to(x.dtype)))
        own = None if loss_weights is None else loss_weights.flatten()
        output = self.head_loss(x, labels.flatten(), own)
        return output._replace(
            aux_losses=beside.aux_losses | output.aux_losses,
            stats=beside.stats | output.stats,
            tapped=beside.tapped,
        )

    def _mask_and_rotation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        positions: Tensor | None,
        document_ids: Tensor | None,
        lengths: Sequence[int] | None,
        cache: CacheView | None,
        path: ComputePath,
    ) -> tuple[AttentionMask | None, Tensor]:
        """The attention mask (None: causality, or that of the cache) and the rotary angles."""
        B, T = input_ids.shape
        device, num_keys = input_ids.device, T
        starts: tuple[int, ...] = (0,)
        if cache is not None:
            lengths = (T,) * B if lengths is None else lengths
            starts = cache.begin(path, lengths, T)
            num_keys = max(map(sum, zip(starts, lengths, strict=True)))
        offset = max(starts)
        if positions is None and min(starts) < offset:
            positions = torch.tensor(starts, device=device)[:, None] + torch.arange(
                T, device=device
            )
        cos_sin = self.rope(positions, T, offset)
        if cache is not None and attention_mask is None:
            return None, cos_sin
        mask = build_mask(
            batch_size=B,
            num_heads=self.config.num_heads,
            num_queries=T,
            num_keys=num_keys,
            dtype=self.dtype,
            device=device,
            attention_mask=attention_mask,
            document_ids=document_ids,
            dense_documents=not self._reads_documents,
            starts=starts,
        )
        return mask, cos_sin

    def head_loss(
        self, x: Tensor, labels: Tensor, loss_weights: Tensor | None = None
    ) -> ModelOutput:
        """The summed loss of ``labels`` ``[B*T]``, optionally weighted, at the normalized states
        ``x`` ``[B, T, C]``."""
        sums = linear_cross_entropy(
            x.flatten(0, 1),
            self.head_weight,
            labels,
            loss_weights=loss_weights,
            z_weight=self.config.z_loss,
            count_correct=not self.training,
        )
        return ModelOutput(
            loss=sums.cross_entropy,
            num_tokens=(labels != IGNORED_LABEL).sum(),
            aux_losses={} if sums.z_loss is None else {"z_loss": sums.z_loss},
            stats={} if sums.num_correct is None else {"num_correct": sums.num_correct},
        )

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialize every weight by ``config.init``, and every buffer as configured."""
        self.reset_buffers()
        init_parameters(self, self.config, generator)

    def reset_buffers(self) -> None:
        """Recompute buffers that follow from the configuration (after ``to_empty``)."""
        self.rope.reset_tables()
        if self.routing is not None:
            self.routing.reset()
        for layer in self.expert_layers().values():
            layer.router.reset_buffers()

    def expert_layers(self) -> dict[int, MixtureOfExperts]:
        """The layers that have experts, by their index."""
        return {
            index: block.feed_forward
            for index, block in enumerate(self.blocks)
            if isinstance(block.feed_forward, MixtureOfExperts)
        }

    @torch.no_grad()
    def move_selection_biases(self, load: Tensor) -> None:
        """Adjust the biases to balance the experts' load, once after each optimizer step.

        ``load`` ``[L, E]`` is ``stats["expert_load"]`` of the whole step.
        """
        assert self.routing is not None, "a model with experts"
        rate = self.routing.now().bias_rate
        for number, layer in enumerate(self.expert_layers().values()):
            layer.router.move_bias(load[number], rate)

    def set_attention_backend(self, name: str) -> None:
        """Compute attention with the registered backend ``name``; ``auto`` means sdpa here."""
        name = "sdpa" if name == "auto" else name
        self._backend: AttentionBackend = ATTENTION_BACKENDS.load(name)
        self._reads_documents = name in READS_DOCUMENTS
        self.attention_backend = name

    def set_activation_checkpointing(self, mode: str) -> None:
        """Keep every activation (``none``), the products (``selective``) or each block's input
        (``full``) for the backward pass; no effect without gradients."""
        self.activation_checkpointing = check_mode(mode)

    def new_cache(self, batch_size: int, max_length: int) -> ContiguousCache:
        """An empty cache of ``max_length`` positions for ``batch_size`` sequences."""
        return ContiguousCache(self.config, batch_size, max_length, self.device, self.dtype)


def transformers_in(module: nn.Module) -> list[Transformer]:
    """``module`` itself, or the Transformers inside it."""
    return [each for each in module.modules() if isinstance(each, Transformer)]


def _last(x: Tensor, lengths: Sequence[int] | None) -> Tensor:
    """The states ``[B, 1, C]`` of each row's last real token."""
    if lengths is None:
        return x[:, -1:]
    last = torch.tensor([max(length, 1) - 1 for length in lengths], device=x.device)
    return x[torch.arange(len(x), device=x.device), last][:, None]


def _reported(routings: list[LayerRouting]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Auxiliary losses, summed over the L layers with experts, and statistics ``[L, E or G]``."""
    if not routings:
        return {}, {}
    total = torch.stack([routing.losses for routing in routings]).sum(0)
    # Copies, because FSDP warns if an output is a view.
    losses = {f"moe_{name}": total[index].clone() for index, name in enumerate(LOSSES)}
    of_groups = [routing.group_loss for routing in routings if routing.group_loss is not None]
    if of_groups:
        losses["moe_groups"] = torch.stack(of_groups).sum(0)
    stats = {
        f"expert_{name}": torch.stack([getattr(routing, name) for routing in routings]).detach()
        for name in routings[0].observed()
    }
    return losses, stats


def _check_group_targets(
    group_targets: Tensor | None, input_ids: Tensor, config: ModelConfig
) -> None:
    if group_targets is None:
        return
    if config.moe is None or not config.moe.group_gates:
        raise ValueError("group_targets needs a model with group gates (model.moe.group_gates).")
    wanted = [*input_ids.shape, len(config.moe.groups)]
    if list(group_targets.shape) != wanted:
        raise ValueError(
            f"group_targets has shape {list(group_targets.shape)}; it must be {wanted}, boolean."
        )


def _check_shapes(
    input_ids: Tensor,
    of_tokens: Mapping[str, Tensor | None],
    positions: Tensor | None,
    lengths: Sequence[int] | None,
    cache: CacheView | None,
) -> None:
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids has shape {list(input_ids.shape)}; it must be [B, T].")
    B, T = input_ids.shape
    for name, value in of_tokens.items():
        if value is not None and value.shape != input_ids.shape:
            raise ValueError(
                f"{name} has shape {list(value.shape)}; it must be that of input_ids, [{B}, {T}]."
            )
    if positions is not None and tuple(positions.shape) not in ((T,), (1, T), (B, T)):
        raise ValueError(
            f"positions has shape {list(positions.shape)}; it must be [{T}] or [{B}, {T}]."
        )
    if lengths is not None:
        fits = len(lengths) == B and all(0 <= length <= T for length in lengths)
        if not fits or not any(lengths):
            raise ValueError(
                f"lengths is {list(lengths)}; it must have {B} numbers of 0 to {T}, not all 0."
            )
    if cache is not None and of_tokens["document_ids"] is not None:
        raise ValueError("document_ids cannot be used with a cache, which holds one document each.")
