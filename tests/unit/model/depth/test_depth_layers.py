"""Depth routing beside a loop over sequences: who goes through, and what becomes of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.unit.model.conftest import TINY
from tests.unit.model.depth.routed import SCOPES, STRATEGIES, routed_model
from tests.unit.model.experts.mixtures import ONE, mixture
from ultrathink.config.depth import ModConfig
from ultrathink.config.model import ATTENTION_BACKENDS, ModelConfig
from ultrathink.config.optimizer import MuonConfig
from ultrathink.config.size import sizes
from ultrathink.core.errors import ConfigError
from ultrathink.model.attention_backends import sdpa_attention
from ultrathink.model.compute_path import ComputePath
from ultrathink.model.depth.controls import DepthControls
from ultrathink.model.depth.router import DepthPass, best_tokens, depth_pass
from ultrathink.model.depth.rows import (
    choose_tokens,
    rows_for,
    rows_of,
    sequences_of_rows,
)
from ultrathink.model.experts.router import RoutingPass
from ultrathink.model.experts.sequences import find_sequences
from ultrathink.model.flops import flops_per_token
from ultrathink.model.transformer import Transformer
from ultrathink.training.optimizers import build_optimizers


def chosen_of(model: Transformer, layer: int, x: Tensor, depth: DepthPass) -> list[list[int]]:
    """The tokens of each row that a layer takes, found by sorting."""
    router = model.blocks[layer].depth
    states = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    weight = router.router.weight[0]
    scores = states @ (weight / max(1.0, float(weight.norm())))
    count = math.ceil(depth.eighths * x.shape[1] / 8)
    return [sorted(row.argsort(descending=True)[:count].tolist()) for row in scores]


@torch.no_grad()
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("capacity", [0.125, 0.5, 0.75, 1.0])
def test_a_layer_equals_a_loop_over_rows(
    make_model: Any, tokens: Tensor, scope: str, capacity: float
) -> None:
    """Chosen tokens go through the layer of a dense model, alone, at their own positions."""
    model = routed_model(make_model, scope=scope, capacity=capacity)
    block, B, T = model.blocks[1], *tokens.shape
    x = torch.randn(B, T, 32, dtype=torch.float64)
    cos_sin = model.rope(None, T)
    depth = depth_pass(model.depth, ComputePath(), find_sequences(None, None, x, -100), tokens)
    found, _, report = block(x, cos_sin, None, sdpa_attention, None, None, depth)

    expected = x.clone()
    if scope == "feed_forward":
        expected = block.attend(x, cos_sin, None, sdpa_attention, None)
    read = block.attention_norm(x) if scope == "block" else block.feed_forward_norm(expected)
    rows = chosen_of(model, 1, read, depth)
    router = block.depth.router.weight[0]
    for b, row in enumerate(rows):
        states = read[b, row] / (read[b, row].square().mean(-1, keepdim=True) + 1e-6).sqrt()
        gates = 2 * torch.sigmoid(states @ (router / max(1.0, float(router.norm()))))[:, None]
        if scope == "feed_forward":
            expected[b, row] += gates * block.feed_forward(read[b, row])
            continue
        alone = x[b, row][None]
        attended = block.attend(alone, cos_sin[:, :, :, row], None, sdpa_attention, None)
        out = attended + block.feed_forward(block.feed_forward_norm(attended))
        expected[b, row] += gates * (out - alone)[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    mask = torch.zeros(B, T).scatter(1, torch.tensor(rows), 1.0)
    assert torch.equal(report.chosen, mask.to(torch.float64))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=6),
    st.integers(1, 8),
    st.integers(0, 2**31),
    st.booleans(),
)
def test_each_document_chooses_as_if_it_were_alone(
    lengths: list[int], eighths: int, seed: int, has_ties: bool
) -> None:
    """Untrained ends take no place, the rows always suffice, and statistics see their own."""
    generator = torch.Generator().manual_seed(seed)
    T = sum(lengths)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    labels = torch.where(torch.rand(1, T, generator=generator) < 0.3, -100, 1)
    scores = torch.randn(1, T, generator=generator, dtype=torch.float64)
    if has_ties:
        scores = scores.round()
    like = torch.zeros(1, T, 1, dtype=torch.float64)
    sequences = find_sequences(labels, ids, like, -100)
    controls = DepthControls(ModConfig(capacity=eighths / 8))
    chosen = best_tokens(scores, depth_pass(controls, ComputePath(), sequences))
    rows = rows_of(chosen, rows_for(labels, eighths))
    assert int(chosen.sum()) <= rows.tokens.shape[1]
    assert rows.tokens[0].unique().numel() == rows.tokens.shape[1]
    values = torch.randn(1, T, 3, generator=generator, dtype=torch.float64)
    back = rows.scatter(rows.gather(values))
    assert torch.equal(back[chosen], values[chosen])
    mine = sequences_of_rows(sequences, rows)
    means = mine.mean(rows.gather(values))
    begin = 0
    for length in lengths:
        span = slice(begin, begin + length)
        begin += length
        trained = (labels[0, span] != -100).nonzero()[:, 0]
        end = int(trained[-1]) + 1 if len(trained) else 0
        assert int(chosen[0, span].sum()) == end * eighths // 8
        assert not chosen[0, span][end:].any()
        here = scores[0, span][chosen[0, span]]
        others = scores[0, span][:end][~chosen[0, span][:end]]
        assert not len(here) or not len(others) or here.min() >= others.max()
        alone = find_sequences(labels[:, span], torch.zeros(1, length), like[:, span], -100)
        again = best_tokens(scores[:, span], depth_pass(controls, ComputePath(), alone))
        assert torch.equal(again, chosen[:, span])
        counted = chosen[0, span] & (labels[0, span] != -100)
        if counted.any():
            row = int(rows.place[0, span][chosen[0, span]][0])
            expected = values[0, span][counted].mean(0)
            torch.testing.assert_close(means[0, row], expected, rtol=1e-9, atol=1e-9)


def test_equal_scores_are_spread_over_the_sequence() -> None:
    """A router of zeros does not take the first half."""
    scores, places = torch.zeros(1, 64), torch.arange(64)[None]
    chosen = choose_tokens(scores, places, None, torch.full((1, 64), 32))
    assert int(chosen.sum()) == 32
    quarters = chosen.view(4, 16).sum(1)
    assert quarters.min() >= 7


@torch.no_grad()
@pytest.mark.parametrize("scope", SCOPES)
def test_a_new_model_is_the_dense_one(make_model: Any, tokens: Tensor, scope: str) -> None:
    """Gates are exactly 1, and nothing is skipped before a predictor has learned anything."""
    model = make_model(mod={"scope": scope, "layers": "all"}, dtype=torch.float64).eval()
    dense = make_model(dtype=torch.float64).eval()
    weights = {n: v for n, v in model.state_dict().items() if "depth" not in n}
    dense.load_state_dict(weights)
    found, expected = (one(tokens).logits for one in (model, dense))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    if scope == "feed_forward":
        assert torch.equal(found, expected)
        model.train()
        model.depth.set(1.0)
        assert torch.equal(model(tokens).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("scope", SCOPES)
def test_all_strategies_take_their_share(
    make_model: Any, tokens: Tensor, strategy: str, scope: str
) -> None:
    for capacity in (0.25, 0.625):
        model = routed_model(make_model, scope=scope, strategy=strategy, capacity=capacity)
        report = model(tokens, tokens.roll(-1, 1))
        assert report.stats["depth_selected"].tolist() == [2 * 40 * capacity] * 2
        whole = model(tokens, path=ComputePath(depth=1.0)).logits
        assert (whole - model(tokens).logits).abs().max() > 1e-3


@torch.no_grad()
def test_random_choices_follow_from_step_layer_and_token(make_model: Any, tokens: Tensor) -> None:
    model = routed_model(make_model, strategy="random")
    labels = tokens.roll(-1, 1)
    seen = []
    for step in (1, 2, 1):
        model.depth.begin_step(step, 0)
        seen.append(model(tokens, labels).stats["depth_by_place"])
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0][0], seen[0][1])
    model.eval()
    first = model(tokens).logits
    model.depth.begin_step(9, 0)
    assert torch.equal(first, model(tokens).logits)


def test_a_token_that_passes_by_is_in_no_load_and_in_no_loss(
    make_model: Any, tokens: Tensor
) -> None:
    """Experts see the chosen ones only: their loads, drops, losses and gradients are of those."""
    moe = mixture(ONE, routing={"capacity_factor": 1.0}, layers=[1])
    model = routed_model(make_model, moe=moe, layers=[1])
    labels = tokens.roll(-1, 1)
    output = model(tokens, labels)
    selected = float(output.stats["depth_selected"][0])
    assert selected == 40
    assert float(output.stats["expert_load"].sum()) == 2 * selected
    router = model.blocks[1].feed_forward.router
    seen = {}
    router.register_forward_hook(lambda module, args, out: seen.update(x=args[0], out=out))
    model(tokens, labels)
    chosen, routed = seen["x"], seen["out"][1]
    assert chosen.shape[:2] == (2, 20)
    # The same tokens as sequences of their own.
    sequences = find_sequences(None, None, chosen, -100)
    again = router(chosen, RoutingPass(sequences, model.routing.now(), ComputePath()))[1]
    for one, other in zip(routed, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_the_loss_of_chosen_and_skipped_tokens_is_told_apart(
    make_model: Any, tokens: Tensor
) -> None:
    model = routed_model(make_model)
    labels = tokens.roll(-1, 1)
    labels[:, ::5] = -100
    chosen = []
    for router in model.depth_layers().values():
        router.register_forward_hook(lambda module, args, out: chosen.append(out.chosen.flatten()))
    output = model(tokens, labels)
    losses = torch.nn.functional.cross_entropy(
        model(tokens).logits.flatten(0, 1), labels.flatten(), reduction="none"
    )
    expected = torch.stack([*(losses[mask].sum() for mask in chosen[:2]), losses.sum()])
    torch.testing.assert_close(output.stats["depth_losses"], expected)


def test_a_configuration_of_another_scope_has_the_same_weights() -> None:
    shapes = [
        {
            n: tuple(p.shape)
            for n, p in Transformer(ModelConfig(**TINY | {"mod": mod})).named_parameters()
        }
        for mod in ({"scope": "feed_forward"}, {"scope": "block"})
    ]
    assert shapes[0] == shapes[1]
    assert {n for n in shapes[0] if "depth" in n} == {
        f"blocks.1.depth.{name}"
        for name in (
            "router.weight",
            *(f"predictor.{x}" for x in ("inner", "outer", "scale", "bias")),
        )
    }


def test_blocks_are_passed_by_only_with_a_backend_that_takes_masks(make_model: Any) -> None:
    def maskless(query: Tensor, key: Tensor, value: Tensor, mask: Any = None) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)

    maskless.takes_masks = False  # type: ignore[attr-defined]
    ATTENTION_BACKENDS.add("maskless", maskless)
    make_model(mod={"layers": "all"}, backend="maskless")
    with pytest.raises(ConfigError, match=r"scope = 'block'.*'maskless' does not take; use"):
        make_model(mod={"scope": "block"}, backend="maskless")


@torch.no_grad()
def test_a_mask_of_the_caller_is_refused_where_a_cache_hides_tokens(
    make_model: Any, tokens: Tensor
) -> None:
    model = routed_model(make_model, scope="block").eval()
    mask = torch.ones_like(tokens, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"attention_mask cannot be used with a cache.*lengths"):
        model(tokens, attention_mask=mask, cache=model.new_cache(2, 40))


@torch.no_grad()
def test_a_mask_of_the_caller_counts_among_the_chosen(make_model: Any, tokens: Tensor) -> None:
    """A key that is masked is seen by nobody: as if its token were another one."""
    model = routed_model(make_model, scope="block", strategy="fixed").eval()
    other = tokens.clone()
    other[:, 21] = (other[:, 21] + 1) % 53  # an odd position, which is chosen
    mask = torch.ones(2, 1, 40, 40, dtype=torch.bool)
    mask[..., 21] = False
    for one in (mask, torch.where(mask, 0.0, -torch.inf).double()):
        found, changed = (model(each, attention_mask=one).logits for each in (tokens, other))
        assert torch.equal(found[:, 22:], changed[:, 22:])
        assert torch.isfinite(found).all()
    assert not torch.equal(model(tokens).logits[:, 22:], model(other).logits[:, 22:])


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("depth", [None, 0.25])
def test_operations_are_those_of_a_counted_step(
    make_model: Any, scope: str, depth: float | None
) -> None:
    """The counter knows no attention on a CPU, so that is taken from ours."""
    wide = {"hidden_size": 128, "intermediate_size": 256, "num_layers": 4}
    model = make_model(**wide, mod={"layers": "all", "scope": scope})
    ids, path = torch.zeros(32, 16, dtype=torch.int64), ComputePath(depth=depth)
    counter = FlopCounterMode(display=False)
    with counter:
        output = model(ids, ids, path=path)
        (output.loss + sum(output.aux_losses.values())).backward()
    share = (depth or 0.5) if scope == "block" else 1.0
    attention = 4 * 6 * 128 * share * (share * 16 + 1)
    counted = counter.get_total_flops() / 512 + attention
    assert flops_per_token(model.config, 16, path) == pytest.approx(counted, rel=1e-3)


def test_the_estimated_size_is_the_size_of_the_model(make_model: Any) -> None:
    for strategy in STRATEGIES:
        model = make_model(mod={"layers": "all", "strategy": strategy})
        assert sizes(model.config).total == sum(p.numel() for p in model.parameters())


def test_routers_and_predictors_are_not_orthogonalized(make_model: Any) -> None:
    model = make_model(mod={"layers": "all"})
    muon, adamw = build_optimizers(MuonConfig(type="muon"), model)
    names = {p: n for n, p in model.named_parameters()}
    found = {names[p] for group in muon.param_groups for p in group["params"]}
    assert found
    assert not any("depth" in name for name in found)
    others = {names[p] for group in adamw.param_groups for p in group["params"]}
    assert sum("depth" in name for name in others) == 10
