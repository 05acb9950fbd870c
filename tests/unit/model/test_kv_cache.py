"""Decoding with a cache equals the full forward pass, whatever the lengths of the sequences."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache as memoized
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.model.conftest import TINY, VOCAB
from tests.unit.model.experts.mixtures import FOUR, mixture
from ultrathink.config.model import ModelConfig
from ultrathink.core.errors import ConfigError, UltrathinkError
from ultrathink.model.attention_mask import AttentionMask
from ultrathink.model.cache import CacheFullError
from ultrathink.model.compute_path import ComputePath
from ultrathink.model.transformer import Transformer

LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5}
LONGEST = 24
EDGES = ComputePath(layers=(0, 1.0))


@memoized
def model_of(kind: str, dtype: torch.dtype, backend: str) -> Transformer:
    """Three layers, dense or with the four groups of MoE³."""
    options: dict[str, Any] = {"num_layers": 3, "qk_norm": True}
    if kind == "experts":
        options["moe"] = mixture(FOUR, routing={"capacity_factor": 0.3}, shared_size=16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Transformer(ModelConfig.model_validate(TINY | options)).to(dtype).eval()
    model.set_attention_backend(backend)
    return model


MODELS = st.builds(
    model_of,
    st.sampled_from(["dense", "experts"]),
    st.sampled_from(list(LIMITS)),
    st.sampled_from(["sdpa", "blocks", "eager"]),
)
PATHS = st.sampled_from([None, EDGES])


def random_ids(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (length,), generator=generator).tolist()


def pass_of(model: Transformer, chunks: list[list[int]], cache: Any, **options: Any) -> Tensor:
    """Logits ``[B, T, V]`` of chunks of any lengths, padded on the right with a token in use."""
    width = max(map(len, chunks)) + options.pop("extra", 0)
    ids = torch.tensor([chunk + [7] * (width - len(chunk)) for chunk in chunks])
    lengths = [len(chunk) for chunk in chunks]
    logits = model(ids, lengths=lengths, cache=cache, **options).logits
    assert logits is not None
    return logits


def assert_close(model: Transformer, found: Tensor, expected: Tensor) -> None:
    limit = LIMITS[model.dtype]
    torch.testing.assert_close(found, expected, rtol=limit, atol=limit)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), model=MODELS, path=PATHS)
@torch.no_grad()
def test_any_chunks_and_truncations_equal_each_sequence_alone(
    data: st.DataObject, model: Transformer, path: ComputePath | None
) -> None:
    """Rows advance by chunks of their own, none included, and may be set back to any length.

    What was read beyond that were other tokens (rejected drafts), so that leftovers would be seen.
    """
    num_rows = data.draw(st.integers(1, 4), label="rows")
    texts = [random_ids(LONGEST, seed) for seed in range(num_rows)]
    expected = [model(torch.tensor([text]), path=path).logits[0] for text in texts]
    cache = model.new_cache(num_rows, LONGEST)
    done = [0] * num_rows
    for _ in range(data.draw(st.integers(1, 5), label="passes")):
        rooms = [LONGEST - read for read in done]
        equal = data.draw(st.booleans(), label="equal")
        most = [min(rooms)] * num_rows if equal else rooms
        steps = data.draw(st.tuples(*(st.integers(0, room) for room in most)), label="steps")
        steps = (steps[0],) * num_rows if equal else steps
        if not any(steps):
            continue
        extra = data.draw(st.integers(0, 2), label="extra padding")
        chunks = [text[at : at + n] for text, at, n in zip(texts, done, steps, strict=True)]
        logits = pass_of(model, chunks, cache, path=path, extra=extra)
        for row, (at, n) in enumerate(zip(done, steps, strict=True)):
            assert_close(model, logits[row, :n], expected[row][at : at + n])
        done = [at + n for at, n in zip(done, steps, strict=True)]
        rooms = [LONGEST - read for read in done]
        drafts = data.draw(st.tuples(*(st.integers(0, room) for room in rooms)), label="drafts")
        if any(drafts):
            wrong = [random_ids(n, 100 + row) for row, n in enumerate(drafts)]
            pass_of(model, wrong, cache, path=path)
        done = list(data.draw(st.tuples(*(st.integers(0, n) for n in done)), label="kept"))
        cache.truncate(done)
        assert cache.lengths(0) == cache.lengths(2) == tuple(done)
    assert cache.lengths(1) == (tuple(done) if path is None else (0,) * num_rows)


@pytest.mark.parametrize("backend", ["sdpa", "blocks", "eager"])
@torch.no_grad()
def test_equal_lengths_need_no_mask_and_keep_their_bits(backend: str, tokens: Tensor) -> None:
    """The kernel sees what it saw without lengths: no mask, but where a chunk follows others."""
    model = model_of("dense", torch.float32, backend)
    kernel, masks = model._backend, []

    def watched(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask | None) -> Tensor:
        masks.append(mask)
        return kernel(query, key, value, mask)

    caches = model.new_cache(2, 40), model.new_cache(2, 40)
    try:
        model._backend = watched
        for part in tokens.split([20, 1, 1, 17, 1], 1):
            masks.clear()
            plain = model(part, cache=caches[0]).logits
            given = model(part, cache=caches[1], lengths=[part.shape[1]] * 2).logits
            assert torch.equal(plain, given)
            assert {mask is None for mask in masks} == {part.shape[1] != 17}
        masks.clear()
        pass_of(model, [[1, 2, 3], [4]], model.new_cache(2, 3))
        assert masks == [None] * 3, "right padding of a first chunk is hidden by causality"
    finally:
        model._backend = kernel


@torch.no_grad()
def test_experts_do_not_count_padding(tokens: Tensor) -> None:
    model = model_of("experts", torch.float64, "sdpa")
    lengths = [9, 23]
    padded = model(tokens, lengths=lengths, cache=model.new_cache(2, 40)).stats
    alone = [model(tokens[row : row + 1, :length]).stats for row, length in enumerate(lengths)]
    assert padded["expert_load"].sum() > 0
    for name, value in padded.items():
        torch.testing.assert_close(value, alone[0][name] + alone[1][name], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_sequences_can_leave_and_be_copied() -> None:
    model = model_of("experts", torch.float64, "sdpa")
    texts = [random_ids(12, row) for row in range(3)]
    cache = model.new_cache(3, 12)
    pass_of(model, [texts[0][:2], texts[1][:7], texts[2][:5]], cache)
    cache.select([2, 1, 2])
    assert cache.lengths(0) == (5, 7, 5)
    logits = pass_of(model, [texts[2][5:], texts[1][7:], texts[0][5:9]], cache)
    for row, text in enumerate((texts[2], texts[1], texts[2][:5] + texts[0][5:9])):
        start = (5, 7, 5)[row]
        expected = model(torch.tensor([text])).logits[0, start:]
        assert_close(model, logits[row, : len(text) - start], expected)
    for rows in ([], [3], [-1]):
        with pytest.raises(UltrathinkError, match=r"sequences 0 to 2 and cannot keep"):
            cache.select(rows)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_batch_with_a_mask_decodes_like_its_rows(
    make_model: Any, tokens: Tensor, side: str
) -> None:
    model = make_model(dtype=torch.float64).eval()
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, slice(0, 8) if side == "left" else slice(12, 20)] = False
    prompt, following = tokens[:, :20], tokens[:, 20:26]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = model.new_cache(2, 26)
    model(prompt, attention_mask=mask, positions=positions, cache=cache)
    seen = mask
    for step in range(6):
        seen = torch.cat((seen, torch.ones(2, 1, dtype=torch.bool)), 1)
        logits = model(
            following[:, step : step + 1],
            attention_mask=seen,
            positions=(seen.sum(1, keepdim=True) - 1),
            cache=cache,
        ).logits
        for row in range(2):
            alone = torch.cat((prompt[row][mask[row]], following[row, : step + 1]))[None]
            expected = model(alone).logits[:, -1]
            torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_mask_limits_sequences_of_different_lengths(make_model: Any, tokens: Tensor) -> None:
    """Its columns are positions of each sequence; it is combined with causality."""
    model = make_model(dtype=torch.float64).eval()
    mask = torch.ones(2, 14, dtype=torch.bool)
    mask[:, 3:5] = False
    cache = model.new_cache(2, 14)
    texts, firsts = tokens[:, :14].tolist(), (4, 10)
    pass_of(
        model,
        [text[:first] for text, first in zip(texts, firsts, strict=True)],
        cache,
        attention_mask=mask[:, :10],
    )
    rest = [text[first:14] for text, first in zip(texts, firsts, strict=True)]
    logits = pass_of(model, rest, cache, attention_mask=mask)
    expected = model(tokens[:, :14], attention_mask=mask).logits
    for row, first in enumerate(firsts):
        assert_close(model, logits[row, : 14 - first], expected[row, first:])


@torch.no_grad()
def test_a_full_cache_is_an_error_and_stays_usable(make_model: Any, tokens: Tensor) -> None:
    model = make_model().eval()
    cache = model.new_cache(2, 10)
    model(tokens[:, :8], cache=cache)
    with pytest.raises(CacheFullError, match=r"8 of 10 positions and 3 more.*max_length=11"):
        model(tokens[:, 8:11], cache=cache)
    assert isinstance(CacheFullError("x"), ValueError)
    logits = model(tokens[:, 8:10], cache=cache).logits
    torch.testing.assert_close(logits, model(tokens[:, :10]).logits[:, 8:])
    cache.reset()
    logits = model(tokens[:, :10], cache=cache).logits
    torch.testing.assert_close(logits, model(tokens[:, :10]).logits)


@torch.no_grad()
def test_a_pass_that_fails_leaves_no_trace(make_model: Any, tokens: Tensor) -> None:
    model = make_model().eval()
    cache = model.new_cache(2, 10)
    model(tokens[:, :4], cache=cache)

    def fail(*args: Any) -> None:
        raise RuntimeError("broken")

    hook = model.blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        model(tokens[:, 30:36], cache=cache)
    hook.remove()
    assert cache.lengths(0) == cache.lengths(1) == (4, 4)
    logits = model(tokens[:, 4:6], cache=cache).logits
    torch.testing.assert_close(logits, model(tokens[:, :6]).logits[:, 4:])


REFUSED: dict[str, tuple[Callable[[Transformer, Tensor, Any], Any], str]] = {
    "another batch": (
        lambda model, tokens, cache: model(tokens[:1, :3], cache=cache),
        "holds 2 sequences, the input has 1",
    ),
    "another path": (
        lambda model, tokens, cache: model(tokens[:, 3:4], cache=cache, path=ComputePath((1,))),
        r"filled by layers \[0\] and cannot serve layers \[1\].*prefill a new cache",
    ),
    "nothing to run": (
        lambda model, tokens, cache: model(tokens[:, :0], cache=cache, path=ComputePath((0,))),
        "input_ids has no tokens, and none of the cache is pending",
    ),
    "no room in a cache": (
        lambda model, tokens, cache: model.new_cache(2, 0),
        "max_length of at least 1, not 2 and 0",
    ),
    "documents": (
        lambda model, tokens, cache: model(tokens, document_ids=tokens, cache=cache),
        "document_ids cannot be used with a cache",
    ),
    "truncated beyond its end": (
        lambda model, tokens, cache: cache.truncate([3, 4]),
        "sequence 1 of the cache has 3 tokens and cannot be truncated to 4; use 0 to 3",
    ),
    "truncated to less than nothing": (
        lambda model, tokens, cache: cache.truncate([-1, 0]),
        "sequence 0 of the cache has 3 tokens and cannot be truncated to -1",
    ),
    "truncated by too few lengths": (
        lambda model, tokens, cache: cache.truncate([1]),
        "holds 2 sequences, the input has 1",
    ),
    "no real tokens": (
        lambda model, tokens, cache: model(tokens, lengths=[0, 0], cache=cache),
        r"lengths is \[0, 0\]; it must have 2 numbers of 0 to 40, not all 0",
    ),
    "a length too long": (
        lambda model, tokens, cache: model(tokens, lengths=[41, 1], cache=cache),
        r"lengths is \[41, 1\]",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@torch.no_grad()
def test_what_a_cache_cannot_do_is_named_and_changes_nothing(
    make_model: Any, tokens: Tensor, name: str
) -> None:
    model = make_model().eval()
    cache = model.new_cache(2, 40)
    model(tokens[:, :3], cache=cache, path=ComputePath(layers=(0,)))
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call(model, tokens, cache)
    assert (cache.lengths(0), cache.lengths(1)) == ((3, 3), (0, 0))
    cache.truncate([0, 0])  # an empty one serves any path
    logits = model(tokens[:, :3], cache=cache).logits
    torch.testing.assert_close(logits, model(tokens[:, :3]).logits)


def test_a_cache_follows_the_model(make_model: Any) -> None:
    model = make_model(dtype=torch.float32)
    assert model.new_cache(1, 4).keys[0].dtype == torch.float32
    model.compute_dtype = torch.bfloat16
    cache = model.new_cache(1, 4)
    assert cache.keys[0].dtype == cache.values[1].dtype == torch.bfloat16
    assert cache.keys[0].shape == (1, 2, 4, 8)


@pytest.mark.parametrize("lengths", [None, [40, 40], [13, 40]])
@torch.no_grad()
def test_last_only_gives_the_last_logits(
    make_model: Any, tokens: Tensor, lengths: list[int] | None
) -> None:
    model = make_model().eval()
    logits = model(tokens, lengths=lengths, last_only=True).logits
    expected = model(tokens).logits
    for row, length in enumerate(lengths or [40, 40]):
        torch.testing.assert_close(logits[row, 0], expected[row, length - 1])


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, (0, 1, 2, 3)),
        ((0, 3), (0, 3)),
        ((3, 1, 1), (1, 3)),
        ((0.0, 0.5, 1.0), (0, 2, 3)),
        ((0, 0.99), (0, 3)),
    ],
)
def test_layers_by_index_and_fraction(layers: Any, expected: tuple[int, ...]) -> None:
    assert ComputePath(layers).indices(4) == expected


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((4,), "no layer 4; the model has 4, 0 to 3"),
        ((0, -1), "no layer -1"),
        ((1.5,), "fraction 1.5 is outside"),
        ((float("nan"),), "fraction nan is outside"),
        ((True,), "True is not a layer"),
        (("first",), "'first' is not a layer"),
        ((), "is empty"),
    ],
)
def test_a_bad_layer_is_named(layers: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ComputePath(layers).indices(4)


@torch.no_grad()
def test_a_path_leaves_layers_out(make_model: Any, tokens: Tensor) -> None:
    model = make_model(num_layers=3).eval()
    expected = model(tokens, path=ComputePath(layers=(0, 2))).logits
    del model.blocks[1]
    model.config = model.config.model_copy(update={"num_layers": 2})
    torch.testing.assert_close(model(tokens).logits, expected)
