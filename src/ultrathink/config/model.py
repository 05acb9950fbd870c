"""Section ``model``: the shape of the network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import model_validator

from ultrathink.config.base import Section, alike, off_means, one_of
from ultrathink.config.depth import ModConfig
from ultrathink.config.experts import BIAS_RATE, WIDTH_STEP, MoeConfig, shape
from ultrathink.config.options import felt, fixed, free
from ultrathink.config.paths import (
    TRAINED,
    ExitsConfig,
    PathConfig,
    check_depth,
    groups_that_run,
    named_paths,
)
from ultrathink.core.divisors import divisors
from ultrathink.core.errors import ConfigError, suggestion
from ultrathink.core.layers import layer_index
from ultrathink.core.registry import Registry

ATTENTION_BACKENDS: Registry[Callable[..., Any]] = Registry("attention backend")
ATTENTION_BACKENDS.add("sdpa", "ultrathink.model.attention_backends:sdpa_attention")
ATTENTION_BACKENDS.add("blocks", "ultrathink.model.attention_backends:block_causal_attention")
ATTENTION_BACKENDS.add("eager", "ultrathink.model.attention_backends:eager_attention")

FEED_FORWARDS: Registry[Any] = Registry("feed-forward")
FEED_FORWARDS.add("swiglu", "ultrathink.model.feed_forward:SwiGLU")
FEED_FORWARDS.add("relu2", "ultrathink.model.feed_forward:ReLUSquared")
EXPERT_FEED_FORWARDS = ("swiglu", "relu2")  # what an expert can be

drawn = partial(fixed, because="weights are drawn once, when a run starts")


class RopeScalingConfig(Section):
    """How rotary positions are stretched beyond the length a model was trained at."""

    type: Literal["linear", "yarn", "llama3"] = felt()
    """Rule that stretches the rotary frequencies."""
    factor: float = felt(gt=0)
    """How many times longer the context becomes."""
    original_max_positions: int = felt(8192, gt=0)
    """Context length before stretching, in tokens (yarn, llama3)."""
    low_freq_factor: float = felt(1.0, gt=0)
    """Below original/low_freq_factor wavelengths blend (llama3)."""
    high_freq_factor: float = felt(4.0, gt=0)
    """Above this many turns a frequency is left alone (llama3)."""
    beta_fast: float = felt(32.0, gt=0)
    """Turns from which a frequency is left alone (yarn)."""
    beta_slow: float = felt(1.0, gt=0)
    """Turns up to which a frequency is fully stretched (yarn)."""
    attention_factor: float | None = felt(None, gt=0)
    """Scale of cos and sin; 0.1·ln(factor)+1 when unset (yarn)."""

    @model_validator(mode="after")
    def _frequencies_are_ordered(self) -> RopeScalingConfig:
        if self.type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor ({self.high_freq_factor}) must exceed low_freq_factor "
                f"({self.low_freq_factor})"
            )
        if self.type == "yarn" and self.beta_fast <= self.beta_slow:
            raise ValueError(
                f"beta_fast ({self.beta_fast}) must exceed beta_slow ({self.beta_slow})"
            )
        return self


class AttentionConfig(Section):
    """How attention is computed."""

    backend: Annotated[str, one_of(ATTENTION_BACKENDS, "auto")] = free(
        "auto",
        rests_on=("training.device", "training.precision", "training.compile", "data.seq_len"),
    )
    """Kernel of the attention product: a registered name (sdpa, blocks, eager), or auto to choose
    for the device, the length and the precision."""


class InitConfig(Section):
    """How weights start."""

    std: float = drawn(0.02, gt=0)
    """Standard deviation of the truncated normal, cut at 3 of it."""
    residual: Literal["depth_scaled", "zero"] = drawn("depth_scaled")
    """Projections that write to the residual stream start at std/√(2·num_layers), or at zero."""


class ModelConfig(Section):
    """A decoder of the Llama family."""

    hidden_size: int = shape(256, gt=0)
    """Width of the residual stream."""
    num_layers: int = shape(4, gt=0)
    """Number of blocks."""
    num_heads: int = shape(8, gt=0)
    """Query heads of an attention layer."""
    num_kv_heads: int | None = shape(None, gt=0)
    """Key and value heads; num_heads when unset, 1 is multi-query."""
    head_dim: int | None = shape(None, gt=0)
    """Width of one head; hidden_size / num_heads when unset."""
    intermediate_size: int | None = shape(None, gt=0)
    """Width of the feed-forward layer; 8/3 of hidden_size (4 for relu2), rounded up to a multiple
    of 16, when unset."""
    vocab_size: int | None = shape(None, gt=0)
    """Rows of the embedding; the tokenizer's size when unset."""
    feed_forward: Annotated[str, one_of(FEED_FORWARDS)] = shape("swiglu")
    """Registered feed-forward: swiglu or relu2."""
    rope_theta: float = felt(10_000.0, gt=0)
    """Base of the rotary frequencies."""
    rope_scaling: RopeScalingConfig | None = felt(None)
    """Stretching of rotary positions; none when unset."""
    max_positions: int | None = free(None, gt=0)
    """Context length of the model, in tokens; data.seq_len when unset. It is written to exports and
    changes nothing else."""
    tie_embeddings: bool = shape(True)
    """Share the embedding with the output head."""
    qk_norm: bool = shape(False)
    """RMSNorm on each query and key head before RoPE."""
    qkv_bias: bool = shape(False)
    """Biases on queries, keys and values, as in Qwen2; they start at zero."""
    norm_eps: float = shape(1e-5, gt=0)
    """Constant inside the RMSNorm root."""
    dropout: float = felt(0.0, ge=0, lt=1)
    """Dropout on the embedding and on each block's two outputs."""
    z_loss: float = felt(0.0, ge=0)
    """Weight of the mean squared log-partition of the logits."""
    attention: AttentionConfig = AttentionConfig()
    """How attention runs."""
    init: InitConfig = InitConfig()
    """How weights start."""
    moe: MoeConfig | None = shape(None)
    """Groups of experts in place of feed-forward layers; none when unset."""
    mod: ModConfig | None = shape(None)
    """Depth routing, by which tokens pass layers by; none when unset."""
    paths: tuple[PathConfig, ...] = fixed((), because=TRAINED)
    """Parts of the model that can run alone, by name. fast, standard, expert, deep and ultra_deep
    exist without being named (docs/elastic.md)."""
    exits: ExitsConfig = ExitsConfig()
    """Layers after which the model can end early."""

    @model_validator(mode="after")
    def _shapes_fit(self) -> ModelConfig:
        kv_heads = self.num_kv_heads
        if kv_heads is not None and self.num_heads % kv_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({kv_heads}); "
                f"divisors: {', '.join(map(str, divisors(self.num_heads)))}"
            )
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_heads "
                f"({self.num_heads}), or head_dim must be set"
            )
        head_dim = self.head_dim or self.hidden_size // self.num_heads
        if head_dim % 2:
            raise ValueError(
                f"the head dimension ({head_dim}) must be even for rotary positions; choose "
                f"another num_heads or set head_dim"
            )
        return self

    @model_validator(mode="after")
    def _experts_fit(self) -> ModelConfig:
        if self.moe is None:
            return self
        if self.feed_forward not in EXPERT_FEED_FORWARDS:
            raise ValueError(
                f"experts compute {' or '.join(EXPERT_FEED_FORWARDS)}, and feed_forward is "
                f"{self.feed_forward!r}; choose one of them, or leave moe out"
            )
        if self.hidden_size % WIDTH_STEP:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of {WIDTH_STEP} for a model "
                f"with experts, because the grouped product reads rows of 16 bytes"
            )
        if not self.moe.layer_indices(self.num_layers):
            raise ValueError(
                f"moe.layers is {self.moe.layers!r}, which is no layer of a model with num_layers "
                f"= {self.num_layers}; use all, or name layers"
            )
        return self

    @model_validator(mode="after")
    def _depth_routing_fits(self) -> ModelConfig:
        if self.mod is not None and not self.mod.layer_indices(self.num_layers):
            raise ValueError(
                f"mod.layers is {self.mod.layers!r}, which is no layer of a model with num_layers "
                f"= {self.num_layers}; use all, or name layers"
            )
        return self

    @model_validator(mode="after")
    def _paths_fit(self) -> ModelConfig:
        twice = alike([path.name for path in self.paths])
        if twice is not None:
            raise ValueError(f"two paths are called {twice!r}; give each its own name")
        for path in self.paths:
            routed = self.routed(path.indices(self.num_layers))
            groups = None if path.groups == "all" else path.groups
            groups_that_run(self.moe, routed, groups, f"groups of path {path.name!r}")
            check_depth(path.depth, self.mod is not None, f"depth of path {path.name!r}")
        if self.exit_layers and self.exit_layers[-1] == self.num_layers - 1:
            raise ValueError(
                f"exits.layers names layer {self.num_layers - 1}, which is the last of the model; "
                f"an exit comes before it"
            )
        return self

    def derived(self) -> dict[str, tuple[float, str]]:
        """The sizes left unset: by dotted key, the value and what it follows from."""
        sizes: dict[str, tuple[float, str]] = {}
        if self.num_kv_heads is None:
            sizes["num_kv_heads"] = (self.num_heads, "num_heads")
        if self.head_dim is None:
            sizes["head_dim"] = (self.hidden_size // self.num_heads, "hidden_size / num_heads")
        if self.intermediate_size is None:
            ratio = 4.0 if self.feed_forward == "relu2" else 8 / 3
            width = math.ceil(self.hidden_size * ratio / 16) * 16
            sizes["intermediate_size"] = (width, f"hidden_size x {ratio:.3g}, in steps of 16")
        if self.moe is not None and self.moe.intermediate_size is None:
            dense = self.intermediate_size or sizes["intermediate_size"][0]
            num_experts = self.moe.experts_per_token
            width = math.ceil(dense / num_experts / WIDTH_STEP) * WIDTH_STEP
            reason = f"model.intermediate_size / {num_experts} experts of a token"
            sizes["moe.intermediate_size"] = (width, reason)
        if self.moe is not None and self.moe.balance.bias_rate is None:
            is_mixtral = len(self.moe.groups) == 1
            reason = "the number of groups, one as in Mixtral" if is_mixtral else "several groups"
            sizes["moe.balance.bias_rate"] = (0.0 if is_mixtral else BIAS_RATE, reason)
        if self.mod is not None and self.mod.predictor.hidden_size is None:
            width = max(8, self.hidden_size // 16)
            reason = "a sixteenth of model.hidden_size, at least 8"
            sizes["mod.predictor.hidden_size"] = (width, reason)
        return sizes

    def resolved(self) -> ModelConfig:
        """This configuration with every size set, except a vocabulary that was not given."""
        resolved: ModelConfig = self
        for name, (value, _) in self.derived().items():
            resolved = _with_value(resolved, name.split("."), value)
        return resolved

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """Layers that have experts."""
        return () if self.moe is None else self.moe.layer_indices(self.num_layers)

    @property
    def depth_layers(self) -> tuple[int, ...]:
        """Layers that tokens may pass by."""
        return () if self.mod is None else self.mod.layer_indices(self.num_layers)

    def routed(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Those of ``layers`` that have experts."""
        return tuple(layer for layer in layers if layer in self.expert_layers)

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """The layers after which the model can end early, ascending."""
        where, number = "model.exits.layers", self.num_layers
        given = {layer_index(layer, number, where) for layer in self.exits.layers}
        return tuple(sorted(given or {layers[-1] for layers in self.prefix_paths.values()}))

    @property
    def exits_with_norms(self) -> tuple[int, ...]:
        """The exits that have a norm of their own."""
        return self.exit_layers if self.exits.own_norms else ()

    @property
    def prefix_paths(self) -> dict[str, tuple[int, ...]]:
        """The layers of the named paths that begin the whole model and end early."""
        found = {}
        for name, path in named_paths(self.paths, self.moe).items():
            layers = path.indices(self.num_layers)
            is_begin = layers == tuple(range(len(layers))) and len(layers) < self.num_layers
            is_same = path.groups == "all" and path.top_k == 1
            if is_begin and (is_same or not self.routed(layers)):
                found[name] = layers
        return found

    @property
    def path_names(self) -> tuple[str, ...]:
        """The names of all compute paths."""
        return tuple(named_paths(self.paths, self.moe))

    def path(self, name: str) -> PathConfig:
        """The compute path ``name``, in any case; ConfigError if it does not exist."""
        paths = named_paths(self.paths, self.moe)
        if name.lower() not in paths:
            there = suggestion(name.lower(), paths)
            raise ConfigError(f"there is no compute path {name!r}. {there}")
        return paths[name.lower()]


def _with_value(section: Any, path: list[str], value: float) -> Any:
    """A copy of ``section`` with one value, given by its path, changed."""
    name, *rest = path
    inner = _with_value(getattr(section, name), rest, value) if rest else value
    return section.model_copy(update={name: inner})


Checkpointing = Annotated[Literal["none", "selective", "full"], off_means("none")]
