"""Logits and losses against Hugging Face's LlamaForCausalLM and a loop in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ultrathink.config.model import ModelConfig, RopeScalingConfig
from ultrathink.interop.families import write_family
from ultrathink.interop.weights import row_slices
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


def theirs_like(config: ModelConfig) -> Any:
    """A model of ``transformers`` for ``config``, of fp32."""
    options = AutoConfig.for_model(**write_family(config, 256))
    return AutoModelForCausalLM.from_config(options, attn_implementation="eager").float()


@torch.no_grad()
def copy_weights(theirs: Any, ours: Transformer) -> None:
    """Give our model the weights of theirs, every tensor exactly once."""
    weights, parameters = dict(theirs.named_parameters()), dict(ours.named_parameters())
    for entry in row_slices(ours.config):
        entry.of(parameters[entry.ours]).copy_(weights.pop(entry.theirs))
    assert not weights, f"not mapped: {list(weights)}"


def build_pair(**changes: Any) -> tuple[Any, Transformer]:
    config = ModelConfig.model_validate(SHAPE | changes)
    torch.manual_seed(0)
    theirs = theirs_like(config)
    with torch.no_grad():
        for parameter in theirs.parameters():  # norms too, so that none can be forgotten
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.15)
    ours = Transformer(config)
    copy_weights(theirs, ours)
    return theirs.eval(), ours.eval()


def make_tokens(length: int = 48) -> Tensor:
    return torch.randint(0, VOCAB, (2, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("backend", ["sdpa", "blocks", "eager"])
@pytest.mark.parametrize(("num_kv_heads", "tied"), [(6, True), (2, False), (1, True)])
@torch.no_grad()
def test_logits_equal_hugging_face(backend: str, num_kv_heads: int, tied: bool) -> None:
    theirs, ours = build_pair(num_kv_heads=num_kv_heads, tie_embeddings=tied)
    ours.set_attention_backend(backend)
    tokens = make_tokens()
    expected = theirs(tokens).logits
    assert expected.std() > 0.5, "the comparison needs logits that differ"
    torch.testing.assert_close(ours(tokens).logits, expected, atol=1e-5, rtol=1e-5)


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
    rotary = theirs_like(config).model.rotary_emb
    ours = inverse_frequencies(64, 500_000.0, config.rope_scaling)
    torch.testing.assert_close(ours.float(), rotary.inv_freq, rtol=2e-6, atol=0.0)
    assert attention_factor(config.rope_scaling) == pytest.approx(rotary.attention_scaling)


def test_attention_factor_without_stretching_is_one() -> None:
    assert attention_factor(RopeScalingConfig(type="yarn", factor=0.5)) == 1.0


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
