"""The model as a whole: precisions, initialization, dropout, meta construction, metadata."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ultrathink.config.model import ModelConfig
from ultrathink.core.errors import ConfigError
from ultrathink.model.compute_path import ComputePath
from ultrathink.model.transformer import Transformer

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compute_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("backend", "feed_forward"), [("sdpa", "swiglu"), ("blocks", "relu2"), ("eager", "swiglu")]
)
def test_every_precision_runs_and_is_near_float64(
    make_model: Any,
    tokens: Tensor,
    dtype: torch.dtype,
    compute_dtype: torch.dtype | None,
    backend: str,
    feed_forward: str,
) -> None:
    options = {"feed_forward": feed_forward, "qk_norm": True, "init": {"std": 0.1}}
    exact = make_model(dtype=torch.float64, **options)
    model = make_model(dtype=dtype, backend=backend, **options)
    model.load_state_dict(exact.state_dict())
    model.compute_dtype = compute_dtype
    labels = tokens.roll(-1, 1)
    expected, ours = exact(tokens, labels), model(tokens, labels)
    assert ours.loss.dtype == torch.promote_types(model.dtype, torch.float32)
    is_exact = model.dtype == dtype and dtype in (torch.float32, torch.float64)
    assert ours.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6 if is_exact else 0.01)
    (expected.loss / expected.num_tokens).backward()
    (ours.loss / ours.num_tokens).backward()
    for parameter, wanted in zip(model.parameters(), exact.parameters(), strict=True):
        assert parameter.grad.dtype == dtype
        error = (parameter.grad.double() - wanted.grad).norm() / wanted.grad.norm()
        assert error < (1e-5 if is_exact else 0.15)
    logits = model(tokens).logits
    assert logits.dtype == (compute_dtype or dtype)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_a_vocabulary_is_needed() -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size is not set"):
        Transformer(ModelConfig())


@torch.no_grad()
def test_biases_start_at_zero_and_are_added_to_what_they_belong_to(
    make_model: Any, tokens: Tensor
) -> None:
    torch.manual_seed(7)
    plain = make_model()
    torch.manual_seed(7)
    model = make_model(qkv_bias=True)
    biases = {n: p for n, p in model.named_parameters() if n.endswith("bias")}
    assert list(biases) == [f"blocks.{layer}.attention.qkv.bias" for layer in range(2)]
    assert all(torch.all(bias == 0) for bias in biases.values())
    assert torch.equal(model(tokens).logits, plain(tokens).logits)
    for bias in biases.values():
        bias[-2 * 8 :] = 0.5  # the values, whose weights sum to one
    model.compute_dtype = torch.bfloat16
    x = torch.zeros(1, 3, 32, dtype=torch.bfloat16)
    products = model.blocks[0].attention.qkv(x)
    assert products.dtype == torch.bfloat16
    assert torch.equal(products[..., -16:], torch.full((1, 3, 16), 0.5, dtype=torch.bfloat16))
    assert torch.all(products[..., :-16] == 0)


@pytest.mark.parametrize("tied", [True, False])
def test_meta_construction_equals_direct_construction(
    make_model: Any, tokens: Tensor, tied: bool
) -> None:
    torch.manual_seed(7)
    direct = make_model(tie_embeddings=tied)
    with torch.device("meta"):
        model = make_model(tie_embeddings=tied)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    for generator in (None, torch.Generator().manual_seed(7)):
        torch.manual_seed(7 if generator is None else 8)
        before = torch.get_rng_state()
        model.init_weights(generator)
        assert torch.equal(before, torch.get_rng_state()) == (generator is not None)
        for name, parameter in direct.named_parameters():
            assert torch.equal(parameter, model.get_parameter(name))
        assert torch.equal(direct(tokens).logits, model(tokens).logits)


def test_dropout_acts_in_training_only_on_the_embedding_and_both_outputs(
    make_model: Any, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, model = make_model(num_layers=3), make_model(dropout=0.25, num_layers=3)
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model.eval()(tokens).logits, plain(tokens).logits)
    assert not torch.equal(model.train()(tokens).logits, model(tokens).logits)
    calls: list[tuple[float, bool]] = []
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, *args: (calls.append(args), x)[1])
    model(tokens)
    assert calls == [(0.25, True)] * (1 + 2 * 3)


def test_correct_predictions_are_counted_in_evaluation_only(
    make_model: Any, tokens: Tensor
) -> None:
    model = make_model()
    labels = tokens.roll(-1, 1).clone()
    labels[0] = -100
    assert model(tokens, labels).stats == {}
    model.eval()
    hits = (model(tokens).logits.argmax(-1) == labels).sum()
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            out = model(tokens, labels)
        assert out.stats["num_correct"].item() == hits.item()
        assert out.num_tokens.item() == 40
    labels[1] = model(tokens).logits.argmax(-1)[1]
    assert model(tokens, labels).stats["num_correct"].item() == 40


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("backend", ["sdpa", "blocks"])
def test_activation_checkpointing_changes_no_gradient(
    make_model: Any, tokens: Tensor, mode: str, backend: str
) -> None:
    model = make_model(dropout=0.3, backend=backend)
    saved = {}
    gradients = {}
    for each in ("none", mode):
        model.set_activation_checkpointing(each)
        model.zero_grad()
        torch.manual_seed(3)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: (sizes.append(x.numel()), x)[1], lambda x: x
        ):
            loss = model(tokens, tokens.roll(-1, 1)).loss
        loss.backward()
        saved[each] = sum(sizes)
        gradients[each] = [parameter.grad.clone() for parameter in model.parameters()]
    torch.testing.assert_close(gradients[mode], gradients["none"])
    if mode == "full":
        assert saved[mode] < saved["none"] / 2


class CountProducts(TorchDispatchMode):
    """Counts matrix products and attention kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        self.count += name in ("aten::mm", "aten::bmm", "aten::addmm") or (
            "scaled_dot_product" in name and "backward" not in name
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["sdpa", "blocks"])
def test_selective_checkpointing_computes_no_product_again(
    make_model: Any, tokens: Tensor, backend: str
) -> None:
    counts = {}
    model = make_model(backend=backend)
    for mode in ("none", "selective", "full"):
        model.set_activation_checkpointing(mode)
        loss = model(tokens, tokens).loss
        with CountProducts() as counter:
            loss.backward()
        counts[mode] = counter.count
    assert counts["selective"] == counts["none"] > 0
    assert counts["full"] > counts["none"]


def test_activation_checkpointing_is_off_without_gradients_or_with_a_cache(
    make_model: Any, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise AssertionError("checkpointed")

    monkeypatch.setattr("ultrathink.model.activation_checkpointing.checkpoint", refuse)
    model = make_model()
    model.set_activation_checkpointing("full")
    with torch.no_grad():
        model(tokens)
    model(tokens, cache=model.new_cache(2, 40))
    with pytest.raises(AssertionError, match="checkpointed"):
        model(tokens)
    with pytest.raises(ConfigError, match="Did you mean 'selective'"):
        model.set_activation_checkpointing("selectiv")


def test_inputs_of_a_wrong_shape_are_named(make_model: Any, tokens: Tensor) -> None:
    model = make_model()
    with pytest.raises(ValueError, match=r"input_ids has shape \[40\]"):
        model(tokens[0])
    with pytest.raises(ValueError, match=r"labels has shape \[2, 39\].*\[2, 40\]"):
        model(tokens, tokens[:, 1:])
    with pytest.raises(ValueError, match=r"positions has shape \[39\].*\[40\] or \[2, 40\]"):
        model(tokens, positions=torch.arange(39))
    with pytest.raises(ValueError, match=r"document_ids has shape \[1, 40\]"):
        model(tokens, document_ids=tokens[:1])


def test_a_head_of_ones_own_works_inside_the_pass(make_model: Any, tokens: Tensor) -> None:
    """It is given what the logits are made of; the rest of the output stays."""
    model = make_model(tie_embeddings=False)
    labels, logits = tokens.roll(-1, 1), model(tokens).logits

    def head(x: Tensor, weight: Tensor, given: Tensor | None, tapped: Any) -> dict[str, Tensor]:
        assert weight is model.head_weight
        assert given is labels
        return {"logits": x @ weight.T, "loss": -(x @ weight.T).log_softmax(-1).sum()}

    out = model(tokens, labels, head=head)
    assert (out.logits, out.loss, out.num_tokens) == (None, None, None)
    torch.testing.assert_close(out.head["logits"], logits)
    out.head["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_taps_are_the_states_that_a_pass_over_fewer_layers_ends_with(
    make_model: Any, tokens: Tensor
) -> None:
    model = make_model(num_layers=4)
    plain = model(tokens)
    out = model(tokens, tap=(0, 0.5))
    assert torch.equal(out.logits, plain.logits)
    assert (list(out.tapped), plain.tapped) == ([0, 2], {})
    for layer, states in out.tapped.items():
        shorter = model(tokens, path=ComputePath(tuple(range(layer + 1)))).logits
        torch.testing.assert_close(model.norm(states) @ model.head_weight.T, shorter)
    with pytest.raises(ConfigError, match="tap: there is no layer 4"):
        model(tokens, tap=[4])
