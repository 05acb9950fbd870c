"""Which Hugging Face models match a configuration of ours, and the reverse.

The decoders of Llama, Mistral, Qwen2 and Qwen3 differ in few things: Qwen2 has biases on queries,
keys and values, Qwen3 normalizes queries and keys, Mistral and Qwen may look back a window only.
Mixtral is a Mistral with experts. What a ``config.json`` leaves out has the default of its family
in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ultrathink.config.model import ModelConfig
from ultrathink.core.errors import CheckpointError, suggestion
from ultrathink.interop.experts import check_mixtral, read_mixtral, write_mixtral
from ultrathink.interop.rope import read_rope, write_rope
from ultrathink.interop.values import Values, cannot_export

# Keys of the section ``model`` that a checkpoint fixes; the others are free.
SHAPE = (
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "max_positions",
    "feed_forward",
    "rope_theta",
    "rope_scaling",
    "tie_embeddings",
    "qk_norm",
    "qkv_bias",
    "norm_eps",
)
# The same for ``model.moe``: the experts themselves, not how tokens are balanced over them.
EXPERTS_SHAPE = (
    "groups",
    "intermediate_size",
    "shared_size",
    "layers",
    "score",
    "normalize_gates",
    "gate_scale",
    "group_gates",
)


@dataclass(frozen=True)
class Family:
    """A kind of model: its class in transformers, and the defaults that differ between kinds."""

    architecture: str
    num_kv_heads: int | None = None  # None: as many as there are query heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_positions: int = 32_768
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    sliding_window: int | None = None  # where ``config.json`` does not say
    options: Mapping[str, bool] = field(default_factory=dict)  # in our configuration


FAMILIES: Mapping[str, Family] = {
    "llama": Family("LlamaForCausalLM", max_positions=2048),
    "mistral": Family(
        "MistralForCausalLM", num_kv_heads=8, max_positions=131_072, sliding_window=4096
    ),
    "qwen2": Family("Qwen2ForCausalLM", num_kv_heads=32, options={"qkv_bias": True}),
    "qwen3": Family("Qwen3ForCausalLM", num_kv_heads=32, head_dim=128, options={"qk_norm": True}),
    "mixtral": Family(
        "MixtralForCausalLM",
        num_kv_heads=8,
        max_positions=131_072,
        rope_theta=1e6,
        norm_eps=1e-5,
    ),
}


@dataclass(frozen=True)
class Described:
    """The model of a ``config.json``: our configuration, and its attention window."""

    model: ModelConfig
    window: int | None
    """Longest text, in tokens, for which full attention gives the same result; None: no limit."""


def read_family(values: Mapping[str, Any], path: Path) -> Described:
    """Our configuration of the model that a ``config.json`` (``path``, in messages) describes.

    Raises CheckpointError naming the first field that cannot be expressed here.
    """
    config = Values(values, path)
    kind = config.get("model_type")
    if kind not in FAMILIES:
        hint = suggestion(kind, FAMILIES) if isinstance(kind, str) else ""
        raise config.unfit(
            "model_type",
            f"supported are the decoders {', '.join(FAMILIES)}. {hint}".rstrip(" ."),
        )
    family = FAMILIES[kind]
    _refuse_the_inexpressible(config)
    heads = config.count("num_attention_heads")
    max_positions = config.count("max_position_embeddings", family.max_positions)
    theta, scaling = read_rope(config, max_positions, family.rope_theta)
    window = _window(config, kind, family)
    model = {
        "hidden_size": config.count("hidden_size"),
        "num_layers": config.count("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": _count_or_null(config, "num_key_value_heads", family.num_kv_heads) or heads,
        "head_dim": _count_or_null(config, "head_dim", family.head_dim),
        "intermediate_size": config.count("intermediate_size"),
        "vocab_size": config.count("vocab_size"),
        "max_positions": min(max_positions, window or max_positions),
        "feed_forward": "swiglu",
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
        "norm_eps": config.number("rms_norm_eps", family.norm_eps),
        "moe": read_mixtral(config) if kind == "mixtral" else None,
        **family.options,
    }
    try:
        return Described(ModelConfig.model_validate(model).resolved(), window)
    except ValidationError as error:
        first = error.errors()[0]
        problem = first["msg"].removeprefix("Value error, ")
        place = "".join(f"{part}: " for part in first["loc"])
        raise CheckpointError(f"{path} describes no model that works: {place}{problem}.") from None


def _count_or_null(config: Values, name: str, default: int | None) -> int | None:
    """A whole number; ``default`` if the key is absent, None if it is null."""
    if name not in config.values:
        return default
    return None if config.values[name] is None else config.count(name)


def _refuse_the_inexpressible(config: Values) -> None:
    if config.get("quantization_config") is not None:
        raise config.unfit(
            "quantization_config",
            "quantized weights cannot be trained on; take the checkpoint they were made from",
        )
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise config.unfit("hidden_act", "only silu is supported")
    for name in ("attention_bias", "mlp_bias"):
        if config.get(name, False):
            raise config.unfit(
                name,
                "the only biases here are those of Qwen2, on queries, keys and values; take a "
                "checkpoint without them",
            )


def _window(config: Values, kind: str, family: Family) -> int | None:
    """How far attention looks back."""
    if kind == "llama":
        return None
    if kind in ("mistral", "mixtral"):
        return _count_or_null(config, "sliding_window", family.sliding_window)
    types = config.get("layer_types")  # Qwen has a switch, and may have layers of either kind
    slides = bool(config.get("use_sliding_window", False))
    if slides and (types is None or "sliding_attention" in types):
        return config.count("sliding_window", 4096)
    return None


def check_length(described: Described, seq_len: int, path: Path) -> None:
    """Raise CheckpointError if ``seq_len`` exceeds the model's attention window."""
    if described.window is not None and seq_len > described.window:
        raise CheckpointError(
            f"{path}: sliding_window is {described.window}, but attention here spans all of "
            f"data.seq_len ({seq_len}) tokens, which this model was not trained for; set "
            f"data.seq_len={described.window} or less, or take a checkpoint whose sliding_window "
            f"is null."
        )


def choose_family(config: ModelConfig) -> str:
    """The ``model_type`` whose models compute the same as those of ``config``.

    Raises ConfigError naming the value that no family has, and the alternatives.
    """
    if config.feed_forward != "swiglu":
        raise cannot_export(
            f"model.feed_forward is {config.feed_forward}, which no family of Hugging Face has "
            f"that can be exported to ({', '.join(FAMILIES)}).",
            "model.feed_forward=swiglu",
        )
    if config.mod is not None:
        raise cannot_export(
            f"model.mod is set (tokens may pass layers "
            f"{', '.join(map(str, config.depth_layers))} by), and no family of Hugging Face has "
            f"depth routing ({', '.join(FAMILIES)}).",
            "no depth routing (model.mod=null)",
        )
    if config.moe is not None:
        check_mixtral(config)
        return "mixtral"
    if config.qk_norm and config.qkv_bias:
        raise cannot_export(
            "model.qk_norm and model.qkv_bias are both true, which no family of Hugging Face has: "
            "Qwen3 has the norms, Qwen2 the biases.",
            "one of them",
        )
    if config.qk_norm:
        return "qwen3"
    if config.qkv_bias:
        return "qwen2"
    # transformers refuses a Llama whose heads do not divide its width, but accepts it as a Mistral.
    return "llama" if config.hidden_size % config.num_heads == 0 else "mistral"


def write_family(config: ModelConfig, seq_len: int) -> dict[str, Any]:
    """The content of a ``config.json`` for ``config``, which was trained at ``seq_len`` tokens.

    Raises ConfigError where no family has such models.
    """
    config = config.resolved()
    kind = choose_family(config)
    values: dict[str, Any] = {
        "architectures": [FAMILIES[kind].architecture],
        "model_type": kind,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": _max_positions(config, seq_len),
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init.std,
        "attention_dropout": 0.0,
        "use_cache": True,
        **write_rope(config.rope_theta, config.rope_scaling),
    }
    if kind in ("llama", "qwen3"):
        values["attention_bias"] = False
    if kind == "llama":
        values["mlp_bias"] = False
    if kind in ("mistral", "mixtral"):
        values["sliding_window"] = None
    if kind in ("qwen2", "qwen3"):
        values["use_sliding_window"] = False
    if config.moe is not None:
        values |= write_mixtral(config.moe)
    return values


def _max_positions(config: ModelConfig, seq_len: int) -> int:
    """The context length to write: the configured one, or that of training or RoPE scaling."""
    if config.max_positions is not None:
        return max(config.max_positions, seq_len)
    scaling = config.rope_scaling
    if scaling is None or scaling.type == "linear":
        return seq_len
    return max(seq_len, round(scaling.factor * scaling.original_max_positions))
