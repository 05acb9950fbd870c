"""Logits and losses against Hugging Face's LlamaForCausalLM and a loop in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from ultrathink.config.model import ModelConfig, RopeScalingConfig
from ultrathink.model.rope import attention_factor, inverse_frequencies
from ultrathink.model.transformer import Transformer

VOCAB = 61
SHAPE = {
    "hidden_size": 48,
    "num_layers": 3,
    "num_heads": 6,
    "head_dim": 8,
    "intermediate_size": 64,
    "vocab_size": VOCAB,
    "rope_theta": 10_000.0,
    "norm_eps": 1e-5,
}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 3.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_positions": 64,
    },
    "yarn": {"factor": 4.0, "original_max_positions": 32},
}


def hugging_face_scaling(config: ModelConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_type": "default", "rope_theta": config.rope_theta}
    values: dict[str, Any] = {
        "rope_type": scaling.type,
        "rope_theta": config.rope_theta,
        "factor": scaling.factor,
    }
    if scaling.type != "linear":
        values["original_max_position_embeddings"] = scaling.original_max_positions
    if scaling.type == "llama3":
        values["low_freq_factor"] = scaling.low_freq_factor
        values["high_freq_factor"] = scaling.high_freq_factor
    if scaling.type == "yarn":
        values["beta_fast"], values["beta_slow"] = scaling.beta_fast, scaling.beta_slow
        if scaling.attention_factor is not None:
            values["attention_factor"] = scaling.attention_factor
    return values


def hugging_face_options(config: ModelConfig) -> dict[str, Any]:
    config = config.resolved()
    return {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": 256,
        "rope_parameters": hugging_face_scaling(config),
        "attn_implementation": "eager",
    }


def copy_weights(theirs: Any, ours: Transformer) -> None:
    """Give our model the weights of theirs, every tensor exactly once."""
    weights = {name: tensor.detach() for name, tensor in theirs.named_parameters()}
    mapped = {
        "embedding.weight": weights.pop("model.embed_tokens.weight"),
        "norm.weight": weights.pop("model.norm.weight"),
    }
    if ours.head is not None:
        mapped["head.weight"] = weights.pop("lm_head.weight")
    for layer in range(ours.config.num_layers):
        old, new = f"model.layers.{layer}.", f"blocks.{layer}."
        attention = [weights.pop(f"{old}self_attn.{name}_proj.weight") for name in "qkv"]
        gate_up = [weights.pop(f"{old}mlp.{name}_proj.weight") for name in ("gate", "up")]
        mapped[f"{new}attention.qkv.weight"] = torch.cat(attention)
        mapped[f"{new}attention.output.weight"] = weights.pop(f"{old}self_attn.o_proj.weight")
        mapped[f"{new}feed_forward.gate_up.weight"] = torch.cat(gate_up)
        mapped[f"{new}feed_forward.down.weight"] = weights.pop(f"{old}mlp.down_proj.weight")
        mapped[f"{new}attention_norm.weight"] = weights.pop(f"{old}input_layernorm.weight")
        mapped[f"{new}feed_forward_norm.weight"] = weights.pop(
            f"{old}post_attention_layernorm.weight"
        )
        if ours.config.qk_norm:
            for theirs_name, ours_name in (("q_norm", "query_norm"), ("k_norm", "key_norm")):
                mapped[f"{new}attention.{ours_name}.weight"] = weights.pop(
                    f"{old}self_attn.{theirs_name}.weight"
                )
    assert not weights, f"not mapped: {list(weights)}"
    ours.load_state_dict(mapped, strict=True)


def build_pair(**changes: Any) -> tuple[Any, Transformer]:
    config = ModelConfig.model_validate(SHAPE | changes)
    torch.manual_seed(0)
    if config.qk_norm:
        theirs: Any = Qwen3ForCausalLM(Qwen3Config(**hugging_face_options(config)))
    else:
        theirs = LlamaForCausalLM(LlamaConfig(**hugging_face_options(config)))
    with torch.no_grad():
        for parameter in theirs.parameters():  # norms too, so that none can be forgotten
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.15)
    ours = Transformer(config)
    copy_weights(theirs, ours)
    return theirs.eval(), ours.eval()


def make_tokens(length: int = 48) -> Tensor:
    return torch.randint(0, VOCAB, (2, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("backend", ["sdpa", "blocks", "eager"])
@pytest.mark.parametrize("num_kv_heads", [6, 2, 1])
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_logits_equal_hugging_face(backend: str, num_kv_heads: int, tied: bool) -> None:
    theirs, ours = build_pair(num_kv_heads=num_kv_heads, tie_embeddings=tied)
    ours.set_attention_backend(backend)
    tokens = make_tokens()
    expected = theirs(tokens).logits
    assert expected.std() > 0.5, "the comparison needs logits that differ"
    torch.testing.assert_close(ours(tokens).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", list(SCALINGS))
@torch.no_grad()
def test_logits_equal_hugging_face_with_scaled_positions(kind: str) -> None:
    theirs, ours = build_pair(num_kv_heads=2, rope_scaling={"type": kind, **SCALINGS[kind]})
    plain = build_pair(num_kv_heads=2)[1]
    tokens = make_tokens(120)
    logits = ours(tokens).logits
    torch.testing.assert_close(logits, theirs(tokens).logits, atol=1e-5, rtol=1e-5)
    assert (logits - plain(tokens).logits).abs().max() > 1e-2


@torch.no_grad()
def test_logits_equal_hugging_face_with_normalized_queries() -> None:
    theirs, ours = build_pair(num_kv_heads=2, qk_norm=True)
    tokens = make_tokens()
    torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("backend", ["sdpa", "blocks", "eager"])
@torch.no_grad()
def test_padded_logits_equal_hugging_face(side: str, backend: str) -> None:
    theirs, ours = build_pair(num_kv_heads=2)
    ours.set_attention_backend(backend)
    tokens = make_tokens(24)
    mask = torch.ones(2, 24, dtype=torch.bool)
    mask[0, slice(0, 9) if side == "left" else slice(15, 24)] = False
    expected = theirs(tokens, attention_mask=mask.long()).logits
    logits = ours(tokens, attention_mask=mask).logits
    assert logits is not None
    torch.testing.assert_close(logits[mask], expected[mask], atol=1e-5, rtol=1e-5)
    assert torch.isfinite(logits).all()
    unmasked = ours(tokens).logits
    assert unmasked is not None
    if side == "left":
        assert (logits[0, 9:] - unmasked[0, 9:]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", [None, *SCALINGS, "yarn_with_factor"])
def test_frequencies_equal_hugging_face(kind: str | None) -> None:
    scaling = None
    if kind == "yarn_with_factor":
        scaling = {
            "type": "yarn",
            "factor": 16.0,
            "original_max_positions": 4096,
            "beta_fast": 24.0,
            "beta_slow": 2.0,
            "attention_factor": 1.25,
        }
    elif kind is not None:
        scaling = {"type": kind, **SCALINGS[kind]}
    config = ModelConfig.model_validate(
        SHAPE | {"head_dim": 64, "rope_theta": 500_000.0, "rope_scaling": scaling}
    )
    rotary = LlamaForCausalLM(LlamaConfig(**hugging_face_options(config))).model.rotary_emb
    ours = inverse_frequencies(64, 500_000.0, config.rope_scaling)
    torch.testing.assert_close(ours.float(), rotary.inv_freq, rtol=2e-6, atol=0.0)
    assert attention_factor(config.rope_scaling) == pytest.approx(rotary.attention_scaling)


def test_attention_factor_without_stretching_is_one() -> None:
    scaling = RopeScalingConfig(type="yarn", factor=0.5)
    assert attention_factor(scaling) == 1.0


@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_equal_hugging_face(tied: bool) -> None:
    theirs, ours = build_pair(num_kv_heads=2, tie_embeddings=tied)
    tokens = make_tokens()
    labels = tokens.roll(-1, 1).clone()
    labels[:, -1] = -100
    labels[0, :20] = -100
    num_tokens = int((labels != -100).sum())
    shifted = torch.full_like(labels, -100)
    shifted[:, 1:] = labels[:, :-1]  # theirs shifts by itself
    expected = theirs(tokens, labels=shifted).loss
    expected.backward()
    out = ours(tokens, labels)
    assert out.loss is not None
    assert out.logits is None
    loss = out.loss / num_tokens
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    grads = Transformer(ours.config)
    theirs.requires_grad_(False)
    for parameter in theirs.parameters():
        parameter.copy_(parameter.grad)
    copy_weights(theirs, grads)
    for name, parameter in ours.named_parameters():
        expected_grad = grads.get_parameter(name)
        torch.testing.assert_close(parameter.grad, expected_grad, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
def test_loss_equals_a_loop_in_float64(z_loss: float) -> None:
    config = ModelConfig.model_validate(SHAPE | {"z_loss": z_loss, "init": {"std": 0.2}})
    torch.manual_seed(0)
    model = Transformer(config).double()
    tokens = make_tokens(17)
    labels = tokens.roll(-1, 1).clone()
    labels[1, 3:9] = -100
    logits = model(tokens).logits
    assert logits is not None
    total = z_total = 0.0
    trained = correct = 0
    for row, targets in zip(logits.tolist(), labels.tolist(), strict=True):
        for scores, target in zip(row, targets, strict=True):
            if target == -100:
                continue
            trained += 1
            log_partition = math.log(math.fsum(math.exp(score) for score in scores))
            total += log_partition - scores[target]
            z_total += z_loss * log_partition**2
            correct += scores.index(max(scores)) == target
    out = model.eval()(tokens, labels)
    assert out.loss is not None
    assert out.num_tokens is not None
    assert out.loss.item() == pytest.approx(total, rel=1e-12)
    assert out.num_tokens.item() == trained
    assert out.stats["num_correct"].item() == correct
    if z_loss:
        assert out.aux_losses["z_loss"].item() == pytest.approx(z_total, rel=1e-12)
    else:
        assert out.aux_losses == {}
