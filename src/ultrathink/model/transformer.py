"""The decoder. https://arxiv.org/abs/2302.13971

Shapes: B batch, T tokens, S keys (T and those in a cache), C hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultrathink.config.model import ATTENTION_BACKENDS, ModelConfig
from ultrathink.core.errors import ConfigError
from ultrathink.core.layers import layer_index
from ultrathink.model.activation_checkpointing import (
    CheckpointingMode,
    check_mode,
    run_checkpointed,
)
from ultrathink.model.attention_backends import READS_DOCUMENTS, AttentionBackend
from ultrathink.model.attention_mask import AttentionMask, build_mask
from ultrathink.model.block import Block
from ultrathink.model.cache import CacheView, ContiguousCache, Span, tokens_from
from ultrathink.model.compute_path import ComputePath, path_of
from ultrathink.model.depth.block import check_backend, check_no_mask
from ultrathink.model.depth.controls import DepthControls
from ultrathink.model.depth.reports import choices_of, reported_depths
from ultrathink.model.depth.router import DepthPass, DepthRouter, LayerDepth, depth_pass
from ultrathink.model.embedding import Embedding
from ultrathink.model.experts.balance import LOSSES
from ultrathink.model.experts.controls import RoutingControls
from ultrathink.model.experts.layer import MixtureOfExperts
from ultrathink.model.experts.router import LayerRouting, RoutingPass
from ultrathink.model.experts.sequences import find_sequences
from ultrathink.model.init import init_parameters
from ultrathink.model.inputs import check_group_targets, check_shapes
from ultrathink.model.linear import Linear
from ultrathink.model.loss import IGNORED_LABEL, linear_cross_entropy
from ultrathink.model.norm import RMSNorm, rms_norm
from ultrathink.model.output import ModelOutput
from ultrathink.model.rope import RotaryEmbedding
from ultrathink.model.thinning import Thinning, skipped

# A replacement of logits and loss: from the normalized states [B, T, C], the output projection
# [V, C], the labels [B, T], if any, and the tapped states by layer, it computes tensors by name.
Head = Callable[[Tensor, Tensor, Tensor | None, Mapping[int, Tensor]], dict[str, Tensor]]

# The statistics of a layer: of its experts and of its depth routing, where it has them.
LayerReport = tuple[LayerRouting | None, LayerDepth | None]


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
        self.exit_norms = nn.ModuleDict(
            {
                str(layer): RMSNorm(self.config.hidden_size, self.config.norm_eps)
                for layer in self.config.exits_with_norms
            }
        )
        self.head: Linear | None = None
        if not self.config.tie_embeddings:
            self.head = Linear(self.config.hidden_size, self.config.vocab_size)
        self.rope = RotaryEmbedding(self.config)
        self.routing = RoutingControls(self.config.moe) if self.config.moe is not None else None
        # One value for all layers, so that a compiled step has two graphs at most.
        self.has_splits = False
        self.register_load_state_dict_post_hook(_note_splits)  # type: ignore[no-untyped-call]
        self.depth = DepthControls(self.config.mod) if self.config.mod is not None else None
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

    def norm_after(self, layer: int) -> RMSNorm:
        """The norm before the head for a path that ends with ``layer``."""
        name = str(layer)
        return cast(RMSNorm, self.exit_norms[name]) if name in self.exit_norms else self.norm

    def exit_states(self, states: Mapping[int, Tensor], chosen: Tensor) -> Tensor:
        """The normalized states of one of several exits, of which a step need not know which.

        ``states`` are those ``[..., C]`` after some layers, ``chosen`` is the index of one of these
        layers, zero-dimensional.
        """
        first, *others = states
        x, weight = states[first], cast(Tensor, self.norm_after(first).weight)
        for layer in others:
            is_chosen = chosen == layer
            x = torch.where(is_chosen, states[layer], x)
            weight = torch.where(is_chosen, self.norm_after(layer).weight, weight)
        return rms_norm(x, weight, self.norm.eps)

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
        with_pending: bool = False,
        head: Head | None = None,
        tap: Sequence[int | float] = (),
        thinning: Thinning | None = None,
        group_targets: Tensor | None = None,
    ) -> ModelOutput:
        """Logits ``[B, T, V]``, or with ``labels`` the summed loss without storing the logits.

        ``input_ids``, ``labels`` (the target of each position, -100 for untrained ones),
        ``loss_weights`` (of each target; None: 1) and ``document_ids`` are ``[B, T]``. The first
        ``lengths[b]`` tokens of a row are real (None: all), the rest is padding: a cache does not
        keep it, and its logits are meaningless. Tokens of a ``cache`` that a shorter path has read
        run in the further layers of this one together with the new ones, of which there may be
        none, ``[B, 0]``. ``with_pending`` gives their logits too, as draft verification needs them:
        ``[B, P + T, V]``, in each row those of its pending tokens, then those of its new ones.
        ``positions`` is ``[T]`` or ``[B, T]`` and counts from each sequence's length in the cache
        when None. ``attention_mask`` is boolean (True = attend) or additive, ``[B, S]`` or
        broadcastable to ``[B, H, T, S]``. ``last_only`` gives the logits ``[B, 1, V]`` of each
        row's last real token. ``path`` is a part of the model, or the name of one: None is all of
        it. ``head`` replaces logits and loss; it runs inside this pass, where sharded weights are
        gathered. ``tap`` names layers, by index or by fraction, whose residual states ``[B, T, C]``
        are returned too. ``thinning`` leaves layers and experts out at random. ``group_targets``,
        boolean ``[B, T, G]``, are the expert groups that each token belongs to, for the loss of the
        group gates. Raises ValueError for shapes that do not fit, and for what does not exist.
        """
        of_tokens = {"labels": labels, "loss_weights": loss_weights, "document_ids": document_ids}
        check_shapes(input_ids, of_tokens, positions, lengths, cache)
        if lengths is not None and min(lengths) == input_ids.shape[1]:
            lengths = None  # there is no padding
        check_group_targets(group_targets, input_ids, self.config)
        path = path_of(path, self.config)
        spans = _begin(cache, path, input_ids, lengths, positions)
        span = spans[0] if spans else None
        x = self.embedding(input_ids).to(self.dtype)
        x = F.dropout(x, self.config.dropout, self.training)
        mask, cos_sin = self._mask_and_rotation(x, attention_mask, positions, document_ids, span)
        routed, depth = self._routing(
            labels, document_ids, x, lengths, path, span, input_ids, group_targets
        )
        reports: list[LayerReport] = []
        taps = {layer_index(layer, self.config.num_layers, "tap") for layer in tap}
        tapped: dict[int, Tensor] = {}
        joins = {later.layer: later for later in spans[1:]}
        for layer in path.indices(self.config.num_layers):
            if cache is not None and layer in joins:
                x, span, lengths = cache.join(layer, x), joins[layer], joins[layer].lengths
                mask, cos_sin = self._mask_and_rotation(x, attention_mask, None, None, span)
                routed, depth = self._routing(None, None, x, lengths, path, span)
            if spans and x.shape[1] == 0:
                continue  # there are only pending tokens, which run in further layers
            x, report = self._run_block(layer, thinning, x, cos_sin, mask, cache, routed, depth)
            reports.append(report)
            if layer in taps:
                tapped[layer] = _of_input(x, spans, span)
        if cache is not None:
            cache.commit(x if positions is None else None)
        depths = [chosen for _, chosen in reports if chosen is not None]
        losses, stats = _reported(reports if input_ids.shape[1] else [], depths, depth)
        losses = {} if labels is None else losses
        beside = ModelOutput(aux_losses=losses, stats=stats, tapped=tapped)
        if last_only:
            x = _last(x, lengths)
        elif labels is not None or not with_pending:
            x = _of_input(x, spans, span)
        x = self.norm_after(path.indices(self.config.num_layers)[-1])(x)
        return self._output(x, labels, loss_weights, head, beside, choices_of(depths))

    def _run_block(
        self,
        layer: int,
        thinning: Thinning | None,
        x: Tensor,
        cos_sin: Tensor,
        mask: AttentionMask | None,
        cache: CacheView | None,
        routed: RoutingPass | None,
        depth: DepthPass | None,
    ) -> tuple[Tensor, LayerReport]:
        """The states after ``layer``, recomputed in the backward pass where that is configured."""
        if thinning is not None and routed is not None:
            routed = routed._replace(width=thinning.width[:, layer])
        recompute = torch.is_grad_enabled() and cache is None
        mode: CheckpointingMode = self.activation_checkpointing if recompute else "none"
        after, routing, chosen = run_checkpointed(
            mode, self.blocks[layer], x, cos_sin, mask, self._backend, cache, routed, depth
        )
        if thinning is not None:
            after = skipped(thinning.keep[:, layer], x, after)
        return after, (routing, chosen)

    def _output(
        self,
        x: Tensor,
        labels: Tensor | None,
        loss_weights: Tensor | None,
        head: Head | None,
        beside: ModelOutput,
        choices: Tensor | None,
    ) -> ModelOutput:
        """``beside`` with logits or loss, computed from the normalized states ``x``.

        ``choices`` ``[N, X]`` are sets of tokens whose losses are summed too.
        """
        if head is not None:
            return beside._replace(head=head(x, self.head_weight, labels, beside.tapped))
        if labels is None:
            return beside._replace(logits=F.linear(x, self.head_weight.to(x.dtype)))
        own = None if loss_weights is None else loss_weights.flatten()
        output = self.head_loss(x, labels.flatten(), own, choices)
        return output._replace(
            aux_losses=beside.aux_losses | output.aux_losses,
            stats=beside.stats | output.stats,
            tapped=beside.tapped,
        )

    def _routing(
        self,
        labels: Tensor | None,
        document_ids: Tensor | None,
        x: Tensor,
        lengths: Sequence[int] | None,
        path: ComputePath,
        span: Span | None,
        input_ids: Tensor | None = None,
        group_targets: Tensor | None = None,
    ) -> tuple[RoutingPass | None, DepthPass | None]:
        """What the routing of the tokens ``x`` to experts, and past layers, depends on."""
        routed = depth = None
        if self.routing is not None or self.depth is not None:
            sequences = find_sequences(labels, document_ids, x, IGNORED_LABEL, lengths)
        if self.routing is not None:
            routed = RoutingPass(
                sequences, self.routing.now(), path, group_targets, has_splits=self.has_splits
            )
        if self.depth is not None:
            starts = (0,) if span is None else span.starts
            depth = depth_pass(self.depth, path, sequences, input_ids, starts)
        return routed, depth

    def _mask_and_rotation(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        positions: Tensor | None,
        document_ids: Tensor | None,
        span: Span | None,
    ) -> tuple[AttentionMask | None, Tensor]:
        """The attention mask (None: causality, or that of the cache) and the rotary angles for the
        states ``x`` ``[B, T, C]``, with a cache those of ``span``."""
        B, T = x.shape[:2]
        device, num_keys = x.device, T
        starts: tuple[int, ...] = (0,)
        if span is not None:
            starts = span.starts
            num_keys = max(map(sum, zip(starts, span.lengths, strict=True)))
        offset = max(starts)
        if positions is None and min(starts) < offset:
            positions = torch.tensor(starts, device=device)[:, None] + torch.arange(
                T, device=device
            )
        cos_sin = self.rope(positions, T, offset)
        if span is not None and attention_mask is None:
            return None, cos_sin
        if span is not None and self.config.mod is not None:
            check_no_mask(self.config.mod)
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
        self,
        x: Tensor,
        labels: Tensor,
        loss_weights: Tensor | None = None,
        choices: Tensor | None = None,
    ) -> ModelOutput:
        """The summed loss of ``labels`` ``[B*T]``, optionally weighted, at the normalized states
        ``x`` ``[B, T, C]``; also that of each column of ``choices`` ``[B*T, X]``."""
        sums = linear_cross_entropy(
            x.flatten(0, 1),
            self.head_weight,
            labels,
            loss_weights=loss_weights,
            z_weight=self.config.z_loss,
            count_correct=not self.training,
            choices=choices,
        )
        stats = {"num_correct": sums.num_correct, "depth_losses": sums.of_choices}
        return ModelOutput(
            loss=sums.cross_entropy,
            num_tokens=(labels != IGNORED_LABEL).sum(),
            aux_losses={} if sums.z_loss is None else {"z_loss": sums.z_loss},
            stats={name: value for name, value in stats.items() if value is not None},
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
        if self.depth is not None:
            self.depth.reset()
        for router in self.depth_layers().values():
            router.reset_buffers()
        self.has_splits = False

    def note_splits(self) -> None:
        """Note whether any expert is split, after a change of the routers' buffers.

        Unless one is, passes compute nothing for splits.
        """
        routers = [layer.router for layer in self.expert_layers().values()]
        self.has_splits = any(bool(router.branch.any()) for router in routers)

    def expert_layers(self) -> dict[int, MixtureOfExperts]:
        """The layers that have experts, by their index."""
        return {
            index: block.feed_forward
            for index, block in enumerate(self.blocks)
            if isinstance(block.feed_forward, MixtureOfExperts)
        }

    def depth_layers(self) -> dict[int, DepthRouter]:
        """The layers that tokens may pass by, by their index."""
        return {
            index: block.depth
            for index, block in enumerate(self.blocks)
            if isinstance(block.depth, DepthRouter)
        }

    def move_depth_thresholds(self, logits: Tensor) -> None:
        """Adjust the thresholds of the predictors, once after each optimizer step.

        ``logits`` ``[L, 11]`` is ``stats["depth_logits"]`` of the whole step.
        """
        for number, router in enumerate(self.depth_layers().values()):
            if router.is_learned:
                router.move_thresholds(logits[number])

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
        backend: AttentionBackend = ATTENTION_BACKENDS.load(name)
        if self.config.mod is not None:
            check_backend(self.config.mod, name, backend)
        self._backend: AttentionBackend = backend
        self._reads_documents = name in READS_DOCUMENTS
        self.attention_backend = name

    def set_activation_checkpointing(self, mode: str) -> None:
        """Keep every activation (``none``), the products (``selective``) or each block's input
        (``full``) for the backward pass; no effect without gradients."""
        self.activation_checkpointing = check_mode(mode)

    def new_cache(self, batch_size: int, max_length: int) -> ContiguousCache:
        """An empty cache of ``max_length`` positions for ``batch_size`` sequences."""
        return ContiguousCache(self.config, batch_size, max_length, self.device, self.dtype)


def _note_splits(model: Transformer, _: object) -> None:
    """After loading weights and buffers."""
    model.note_splits()


def transformers_in(module: nn.Module) -> list[Transformer]:
    """``module`` itself, or the Transformers inside it."""
    return [each for each in module.modules() if isinstance(each, Transformer)]


def _begin(
    cache: CacheView | None,
    path: ComputePath,
    input_ids: Tensor,
    lengths: Sequence[int] | None,
    positions: Tensor | None,
) -> tuple[Span, ...]:
    """The spans of a pass with a cache; none without one."""
    if cache is None:
        return ()
    B, T = input_ids.shape
    spans = cache.begin(path, (T,) * B if lengths is None else lengths, T)
    if positions is not None and len(spans) > 1:
        raise ValueError(
            "positions cannot be given while the cache has pending tokens of a shorter path, whose "
            "positions they do not say; run those first, with input_ids of shape [B, 0]."
        )
    return spans


def _of_input(x: Tensor, spans: Sequence[Span], span: Span | None) -> Tensor:
    """The states ``[B, T, C]`` of the input's tokens, which follow the pending ones of ``span``."""
    if span is None or span is spans[0]:
        return x
    pending = [start - at for start, at in zip(spans[0].starts, span.starts, strict=True)]
    return tokens_from(x, pending, spans[0].num_tokens)


def _last(x: Tensor, lengths: Sequence[int] | None) -> Tensor:
    """The states ``[B, 1, C]`` of each row's last real token."""
    if lengths is None:
        return x[:, -1:]
    last = torch.tensor([max(length, 1) - 1 for length in lengths], device=x.device)
    return x[torch.arange(len(x), device=x.device), last][:, None]


def _reported(
    reports: list[LayerReport], depths: list[LayerDepth], depth: DepthPass | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Auxiliary losses, summed over the L layers with experts, or with depth routing, and their
    statistics, ``[L, E or G]`` of experts."""
    losses, stats = reported_depths(depths, depth)
    routings = [routing for routing, _ in reports if routing is not None]
    if not routings:
        return losses, stats
    total = torch.stack([routing.losses for routing in routings]).sum(0)
    # Copies, because FSDP warns if an output is a view.
    losses |= {f"moe_{name}": total[index].clone() for index, name in enumerate(LOSSES)}
    of_groups = [routing.group_loss for routing in routings if routing.group_loss is not None]
    if of_groups:
        losses["moe_groups"] = torch.stack(of_groups).sum(0)
    stats |= {
        f"expert_{name}": torch.stack([getattr(routing, name) for routing in routings]).detach()
        for name in routings[0].observed()
    }
    return losses, stats
