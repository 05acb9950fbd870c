"""What a ``config.json`` may say: what it means here, and what is refused, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ultrathink.config.model import ModelConfig
from ultrathink.core.errors import CheckpointError, ConfigError
from ultrathink.interop.families import (
    check_length,
    choose_family,
    read_family,
    write_family,
)

PATH = Path("there/config.json")
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 50,
}
MIXTRAL: dict[str, Any] = {"model_type": "mixtral", "num_key_value_heads": 2}


def read(**values: Any) -> ModelConfig:
    return read_family(LLAMA | values, PATH).model


def refused(**values: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(**values)
    message = str(caught.value)
    assert message.startswith("there/config.json")
    assert "\n" not in message
    return message


# -- defaults --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "mixtral"])
def test_what_is_left_out_has_the_default_of_transformers(kind: str) -> None:
    from transformers import AutoConfig

    described = LLAMA | {"model_type": kind, "num_attention_heads": 32, "hidden_size": 512}
    theirs = AutoConfig.for_model(**described).to_dict()
    assert read_family(described, PATH) == read_family(theirs, PATH)


def test_null_heads_are_all_heads() -> None:
    assert read(model_type="mistral", num_key_value_heads=None).num_kv_heads == 4
    assert read(model_type="qwen3", num_key_value_heads=2, head_dim=None).head_dim == 16


# -- refused ---------------------------------------------------------------------------------------


def test_another_kind_of_model_is_refused_with_those_that_are_known() -> None:
    message = refused(model_type="gemma2")
    assert 'model_type is "gemma2"' in message
    assert "llama, mistral, qwen2, qwen3" in message
    assert "Did you mean 'qwen2'?" in refused(model_type="qwen2_moe")
    assert "model_type is null" in refused(model_type=None)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"hidden_act": "gelu"}, ['hidden_act is "gelu"', "silu"]),
        ({"attention_bias": True}, ["attention_bias is true", "Qwen2"]),
        ({"mlp_bias": True}, ["mlp_bias is true", "without them"]),
        (
            {"quantization_config": {"bits": 4}},
            ['quantization_config is {"bits": 4}', "made from"],
        ),
        ({"hidden_size": None}, ["does not say hidden_size"]),
        ({"hidden_size": "64"}, ['hidden_size is "64"', "whole number above 0"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers is 0"]),
        ({"rms_norm_eps": True}, ["rms_norm_eps is true", "must be a number"]),
        ({"num_key_value_heads": 3}, ["describes no model that works", "num_kv_heads (3)"]),
        ({"rms_norm_eps": 0}, ["describes no model that works: norm_eps: "]),
        ({"rope_scaling": 8}, ["rope_scaling is 8", "must be an object"]),
        (
            {"rope_scaling": {"type": "longrope", "factor": 4.0}},
            ['rope_scaling.type is "longrope"', "default, linear, llama3, yarn"],
        ),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}},
            ['rope_parameters.rope_type is "dynamic"', "Up to 2048 tokens", "to null"],
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            ["rope_parameters.full_attention is {", "some layers"],
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": False}},
            ["rope_scaling.truncate is false"],
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, ["does not say rope_scaling.factor"]),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}},
            ["does not say rope_scaling.high_freq_factor"],
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 4.0,
                    "high_freq_factor": 4.0,
                }
            },
            ["rope_scaling: high_freq_factor (4.0) must exceed"],
        ),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor is 0.5", "whole heads"]),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}},
            ["rope_parameters.partial_rotary_factor is 0.25"],
        ),
        (MIXTRAL | {"num_experts_per_tok": 1}, ["num_experts_per_tok is 1", "2 or more"]),
        (MIXTRAL | {"num_local_experts": 0}, ["num_local_experts is 0", "whole number above 0"]),
        (
            MIXTRAL | {"num_experts_per_tok": 9},
            ["describes no model that works: moe: groups: 0: top_k (9)"],
        ),
        (
            MIXTRAL | {"intermediate_size": 100},
            ["no model that works: moe: intermediate_size (100) must be a multiple of 8"],
        ),
    ],
)
def test_what_cannot_be_expressed_is_named(values: dict[str, Any], said: list[str]) -> None:
    message = refused(**values)
    for words in said:
        assert words in message


# -- positions -------------------------------------------------------------------------------------


def test_the_length_before_stretching_is_found_where_transformers_looks() -> None:
    yarn = {"type": "yarn", "factor": 4.0}
    inside = yarn | {"original_max_position_embeddings": 64}
    for values, original in (
        ({"rope_scaling": yarn}, 2048),
        ({"rope_scaling": inside}, 64),
        ({"rope_scaling": inside, "original_max_position_embeddings": 32}, 32),
    ):
        scaling = read(**values).rope_scaling
        assert scaling is not None
        assert scaling.original_max_positions == original
    scaling = read(rope_scaling=inside | {"factor": None}).rope_scaling
    assert scaling is not None
    assert scaling.factor == 2048 / 64
    scaling = read(rope_scaling=inside | {"beta_fast": 0}).rope_scaling
    assert scaling is not None
    assert scaling.beta_fast == 32.0


# -- windows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_a_text_beyond_the_window_is_refused(kind: str) -> None:
    described = read_family(
        {**LLAMA, "model_type": kind, "num_key_value_heads": 2, "sliding_window": 16}, PATH
    )
    check_length(described, 16, PATH)
    with pytest.raises(CheckpointError, match=r"sliding_window is 16, .*data\.seq_len=16 or less"):
        check_length(described, 17, PATH)


@pytest.mark.parametrize(
    ("values", "window"),
    [
        ({"sliding_window": 16}, None),
        ({"sliding_window": 16, "use_sliding_window": True}, 16),
        ({"use_sliding_window": True}, 4096),
        (
            {
                "sliding_window": 16,
                "use_sliding_window": True,
                "layer_types": ["full_attention", "full_attention"],
            },
            None,
        ),
        (
            {
                "sliding_window": 16,
                "use_sliding_window": True,
                "layer_types": ["full_attention", "sliding_attention"],
            },
            16,
        ),
    ],
)
def test_qwen_has_a_switch_for_its_window(values: dict[str, Any], window: int | None) -> None:
    qwen = {**LLAMA, "model_type": "qwen2", "num_key_value_heads": 2, **values}
    assert read_family(qwen, PATH).window == window


# -- out -------------------------------------------------------------------------------------------


def test_what_no_family_has_is_refused_with_the_alternative() -> None:
    with pytest.raises(ConfigError) as caught:
        choose_family(ModelConfig(feed_forward="relu2"))
    assert "model.feed_forward is relu2" in str(caught.value)
    assert "model.feed_forward=swiglu" in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        choose_family(ModelConfig(qk_norm=True, qkv_bias=True))
    assert "model.qk_norm and model.qkv_bias are both true" in str(caught.value)
    assert "Qwen3 has the norms, Qwen2 the biases" in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        choose_family(ModelConfig.model_validate({"num_layers": 4, "mod": {}}))
    assert "model.mod is set (tokens may pass layers 1, 3 by)" in str(caught.value)
    assert "model.mod=null" in str(caught.value)


GROUPS = [{"name": "experts", "num_experts": 4, "top_k": 2}]


@pytest.mark.parametrize(
    ("changes", "moe", "said"),
    [
        ({"qk_norm": True}, {}, ["model.qk_norm is true", "model.qk_norm=false"]),
        ({"qkv_bias": True}, {}, ["model.qkv_bias is true", "model.qkv_bias=false"]),
        ({"feed_forward": "relu2"}, {}, ["model.feed_forward is relu2", "mixtral"]),
        (
            {},
            {"groups": [*GROUPS, {"name": "meta", "num_experts": 4, "top_k": 1}]},
            ["model.moe.groups has 2 groups (experts, meta)", "with one group"],
        ),
        ({}, {"shared_size": 16}, ["model.moe.shared_size is 16", "model.moe.shared_size=null"]),
        ({}, {"layers": "interleaved"}, ["model.moe.layers is interleaved", "layers=all"]),
        ({}, {"layers": [1, 0.0, 2]}, ["model.moe.layers is [1, 0.0, 2]"]),
        ({}, {"score": "sigmoid"}, ["model.moe.score is sigmoid", "score=softmax"]),
        (
            {},
            {"groups": [{"name": "experts", "num_experts": 4, "top_k": 1}]},
            ["model.moe.groups.0.top_k is 1", "the weight 1", "2 or more"],
        ),
        ({}, {"normalize_gates": False}, ["normalize_gates is false", "normalize_gates=true"]),
        ({}, {"gate_scale": 2}, ["model.moe.gate_scale is 2.0", "model.moe.gate_scale=1"]),
    ],
)
def test_experts_that_no_mixtral_has_are_refused(
    changes: dict[str, Any], moe: dict[str, Any], said: list[str]
) -> None:
    config = ModelConfig.model_validate({**changes, "moe": {"groups": GROUPS, **moe}})
    with pytest.raises(ConfigError) as caught:
        choose_family(config)
    for words in [*said, "To export a model, train it with", "read this run as it is"]:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        ({}, 128),
        ({"max_positions": 4096}, 4096),
        ({"max_positions": 64}, 128),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 128),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_positions": 100}},
            400,
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_positions": 10}}, 128),
    ],
)
def test_the_context_length_that_is_reported(changes: dict[str, Any], length: int) -> None:
    config = ModelConfig.model_validate({"vocab_size": 50, **changes})
    assert write_family(config, 128)["max_position_embeddings"] == length
