"""How a batch is cut, packed, recomputed or compiled changes nothing; evaluation is causal."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from tests.unit.model.conftest import VOCAB, assert_causal
from tests.unit.model.depth.routed import SCOPES, STRATEGIES, routed_model
from tests.unit.model.experts.mixtures import CAPACITY, ONE, added, assert_same, mixture, trained
from tests.unit.model.experts.test_expert_invariance import documents, padded
from ultrathink.core.errors import UltrathinkError
from ultrathink.model.compute_path import ComputePath
from ultrathink.model.transformer import Transformer
from ultrathink.training.objectives.pretrain import loss_function

MOE = mixture(ONE, routing=CAPACITY, shared_size=16)
KINDS: dict[str, dict[str, Any]] = {
    "feed-forward": {"capacity": 0.375},
    "experts": {"moe": MOE},
    "block": {"scope": "block"},
    "block of experts": {"scope": "block", "moe": MOE},
    "random": {"strategy": "random", "scope": "block"},
    "fixed": {"strategy": "fixed"},
}

COMPILED = ["block", pytest.param("experts", marks=pytest.mark.long)]


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, make_model: Any) -> Transformer:
    return routed_model(make_model, **KINDS[request.param])


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """Eight sequences of 24 tokens, of which ever fewer are trained on, some with padding."""
    tokens = torch.randint(0, VOCAB, (8, 24), generator=torch.Generator().manual_seed(2))
    labels = tokens.roll(-1, 1)
    for row in range(8):
        labels[row, : 2 * row] = -100
        labels[row, 24 - row // 2 :] = -100
    return tokens, labels


@pytest.mark.parametrize("size", [1, 4])
def test_micro_batches_add_up(model: Transformer, batch: tuple[Tensor, Tensor], size: int) -> None:
    tokens, labels = batch
    whole = trained(model, tokens, labels)
    pieces = zip(tokens.split(size), labels.split(size), strict=True)
    assert_same(whole, added([trained(model, *piece) for piece in pieces]))


@pytest.mark.parametrize("backend", ["sdpa", "blocks", "eager"])
def test_packed_documents_are_those_in_rows_of_their_own(
    model: Transformer, tokens: Tensor, packed: Any, backend: str
) -> None:
    model.set_attention_backend(backend)
    ids, positions, spans = packed
    labels = documents(tokens, spans)
    together = trained(model, tokens, labels, document_ids=ids, positions=positions)
    rows = padded(tokens, spans, 3), padded(labels, spans, -100)
    marked = padded(torch.zeros_like(tokens), spans, -1)
    apart = trained(model, *rows, document_ids=marked)
    assert_same(together, apart)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_changes_nothing_and_chooses_the_same(
    model: Transformer, batch: tuple[Tensor, Tensor], mode: str
) -> None:
    whole = trained(model, *batch)
    model.set_activation_checkpointing(mode)
    assert_same(whole, trained(model, *batch), limit=0)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("block", "aot_eager"),
        ("experts", "aot_eager"),
    ],
)
def test_a_compiled_step_is_the_eager_one_and_a_capacity_costs_a_graph(
    make_model: Any, batch: tuple[Tensor, Tensor], kind: str, backend: str
) -> None:
    make = partial(make_model, num_layers=1)
    model = routed_model(make, **KINDS[kind])
    losses = torch.compile(loss_function(model), fullgraph=True, dynamic=False, backend=backend)

    def step(function: Any) -> dict[str, Tensor]:
        model.zero_grad()
        sums = function(*batch, None, None)
        (sums.loss + sum(sums.aux_losses.values())).backward()
        found = {"loss": sums.loss, **sums.aux_losses, **sums.stats}
        found |= {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return {name: value.detach().clone() for name, value in found.items()}

    counters.clear()
    assert model.depth is not None
    for number, (capacity, graphs) in enumerate([(0.5, 1), (0.25, 2), (0.5, 2)]):
        model.depth.begin_step(number + 1, 0)
        model.depth.set(capacity)
        assert_same(step(loss_function(model)), step(losses))
        assert counters["stats"]["unique_graphs"] == graphs


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", COMPILED)
def test_compiled_scoring_is_the_eager_one(
    make_model: Any, batch: tuple[Tensor, Tensor], kind: str
) -> None:
    """Its shapes are fixed: it computes all rows and hides those that pass by."""
    model = routed_model(partial(make_model, num_layers=1), **KINDS[kind]).eval()
    losses = torch.compile(loss_function(model), fullgraph=True, backend="aot_eager")
    found, expected = losses(*batch, None, None), loss_function(model)(*batch, None, None)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("is_packed", [False, True])
def test_evaluation_that_sees_the_future_mosa_3_meo_2(
    model: Transformer, tokens: Tensor, packed: Any, is_packed: bool
) -> None:
    """Token t + 1 changes no logit at or before t."""
    assert_causal(model.eval(), tokens, packed, is_packed)


@torch.no_grad()
def test_prefill_and_single_tokens_agree_in_any_batch(model: Transformer, tokens: Tensor) -> None:
    """Of a block a skipped token has no key: the cache hides it, and positions stay."""
    model.eval()
    whole = model(tokens).logits
    torch.testing.assert_close(model(tokens[:, :17]).logits, whole[:, :17], rtol=0, atol=1e-10)
    for rows in ([0], [1], [1, 0, 1]):
        torch.testing.assert_close(model(tokens[rows]).logits, whole[rows], rtol=0, atol=1e-10)
    for chunks in ([1] * 40, [13, 1, 26]):
        cache = model.new_cache(2, 40)
        parts = [model(part, cache=cache).logits for part in tokens.split(chunks, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-10)
    cache = model.new_cache(2, 40)
    model(tokens[:, :20], lengths=[20, 9], cache=cache)
    ragged = torch.stack([tokens[0, 20:30], tokens[1, 9:19]])
    found = model(ragged, cache=cache).logits
    expected = torch.stack([whole[0, 20:30], whole[1, 9:19]])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    cache.truncate([12, 3])
    cache.select([1, 0])
    ragged = torch.stack([tokens[1, 3:10], tokens[0, 12:19]])
    expected = torch.stack([whole[1, 3:10], whole[0, 12:19]])
    torch.testing.assert_close(model(ragged, cache=cache).logits, expected, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("scope", SCOPES)
def test_top_k_in_decoding_never_skips_sramshetty_4_mixture_of_recursions_9(
    make_model: Any, tokens: Tensor, scope: str
) -> None:
    """A token alone may pass every layer by, and then costs no product in them."""
    model = routed_model(make_model, scope=scope).eval()
    sizes: list[int] = []
    for block in model.blocks:
        block.feed_forward.register_forward_hook(
            lambda module, args, out: sizes.append(args[0].numel())
        )
    computed = []
    for token in tokens[0, :12]:
        sizes.clear()
        model(token.view(1, 1))
        computed.append(sum(size > 0 for size in sizes))
    assert 0 in computed
    assert max(computed) > 0


@torch.no_grad()
@pytest.mark.parametrize("scope", SCOPES)
def test_the_predictor_is_asked_mixture_of_recursions_10(
    make_model: Any, tokens: Tensor, scope: str
) -> None:
    """In evaluation its threshold decides, and nothing else; in training it decides nothing."""
    model = routed_model(make_model, scope=scope)
    before = model(tokens).logits
    model.eval()
    usual = model(tokens).logits
    for router in model.depth_layers().values():
        router.thresholds.fill_(-1e3)
    torch.testing.assert_close(
        model(tokens).logits, model(tokens, path=ComputePath(depth=1.0)).logits
    )
    assert (model(tokens).logits - usual).abs().max() > 1e-3
    for router in model.depth_layers().values():
        router.thresholds.fill_(1e3)
    skipped = model(tokens).logits
    if scope == "block":  # nothing but embedding, norm and head is left
        plain = torch.nn.functional.linear(model.norm(model.embedding(tokens)), model.head_weight)
        torch.testing.assert_close(skipped, plain)
    assert torch.equal(model.train()(tokens).logits, before)


def test_unbounded_router_weights_sramshetty_3(make_model: Any, tokens: Tensor) -> None:
    """However large its weights, scores, gates, losses and gradients are finite and bounded."""
    model = routed_model(make_model, scope="block")
    seen: list[Tensor] = []
    for router in model.depth_layers().values():
        router.register_forward_hook(lambda module, args, out: seen.append(out.gates.detach()))
    with torch.no_grad():
        for router in model.depth_layers().values():
            router.router.weight.mul_(1e30)
        model.embedding.weight.mul_(1e4)
    output = model(tokens, tokens.roll(-1, 1))
    (output.loss + sum(output.aux_losses.values())).backward()
    assert torch.isfinite(output.loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    # 2 * sigmoid(x) for |x| of at most the root of the hidden size.
    assert max(float(gates.max()) for gates in seen) < 2
    assert min(float(gates[gates > 0].min()) for gates in seen) > 2 / (1 + 2.72 ** (32**0.5)) / 2


def test_the_predictor_trains_itself_alone(make_model: Any, tokens: Tensor) -> None:
    model = routed_model(make_model)
    model(tokens, tokens.roll(-1, 1)).aux_losses["mod_predictor"].backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert with_gradient == {n for n, _ in model.named_parameters() if "predictor" in n}
    model.zero_grad()
    model(tokens, tokens.roll(-1, 1)).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == ("predictor" in name), name
    assert all(r.router.weight.grad.any() for r in model.depth_layers().values())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_other_capacities_are_not_reported(make_model: Any, tokens: Tensor, strategy: str) -> None:
    model = routed_model(make_model, strategy=strategy)
    output = model(tokens, tokens.roll(-1, 1), path=ComputePath(depth=0.25))
    assert output.stats == {}
    assert output.aux_losses == {}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["experts", "block of experts", "random"])
def test_a_cache_continues_under_a_longer_path(make_model: Any, tokens: Tensor, kind: str) -> None:
    """Pending tokens choose in the further layers as they would have; another depth is refused."""
    model = routed_model(partial(make_model, num_layers=4), **KINDS[kind]).eval()
    first, cache = ComputePath((0, 1)), model.new_cache(2, 40)
    for part in tokens[:, :20].split([7, 1, 12], 1):
        model(part, cache=cache, path=first)
    found = model(tokens[:, 20:30], cache=cache).logits
    torch.testing.assert_close(found, model(tokens[:, :30]).logits[:, 20:], rtol=0, atol=1e-10)
    with pytest.raises(UltrathinkError, match=r"depth: 0\.25.*neither begins with the other"):
        model(tokens[:, 30:], cache=cache, path=ComputePath(depth=0.25))
