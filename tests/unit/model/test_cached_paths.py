"""A cache that one path filled serves the paths that begin with it, or that it begins with.

A pass under any of them equals a full pass under that path over the whole text, whatever paths have
read parts of it before, and whatever was forgotten.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache as memoized
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.model.conftest import TINY, VOCAB
from tests.unit.model.experts.mixtures import FOUR, mixture
from tests.unit.model.test_kv_cache import LIMITS, assert_close, pass_of, random_ids
from ultrathink.config.model import ModelConfig
from ultrathink.core.errors import UltrathinkError
from ultrathink.model.compute_path import ComputePath
from ultrathink.model.transformer import Transformer

WIDTHS = {"fast": 1, "standard": 3, "expert": 3, "deep": 4, "ultra_deep": 4}  # layers of four
NAMES = tuple(WIDTHS)
# Paths that begin each other.
CHAINS: dict[str, tuple[tuple[ComputePath, ...], ...]] = {
    "dense": (
        tuple(ComputePath(layers) for layers in ((0,), (0, 1), (0, 1, 2), None)),
        tuple(ComputePath(layers) for layers in ((1,), (1, 3))),
    ),
    "experts": (
        (ComputePath((0,), ()), ComputePath((0, 1, 2)), ComputePath()),  # layer 0 is dense
        tuple(ComputePath(layers, (), 2.0) for layers in ((0, 1), (0, 1, 2), None)),
        tuple(ComputePath(layers, ("skill",), 2.0) for layers in ((0, 2), (0, 2, 3))),
    ),
}


@memoized
def model_of(kind: str, dtype: torch.dtype, num_layers: int = 4) -> Transformer:
    """Dense, or with two expert groups beside a shared expert in every second layer."""
    options: dict[str, Any] = {"num_layers": num_layers, "qk_norm": True, "tie_embeddings": False}
    if kind == "experts":
        layers = list(range(1, num_layers, 2))
        options["moe"] = mixture(FOUR[1:3], layers=layers, shared_size=16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Transformer(ModelConfig.model_validate(TINY | options)).to(dtype).eval()


def full_pass(model: Transformer, texts: Sequence[list[int]], path: ComputePath | str) -> Tensor:
    """Logits ``[B, T, V]`` without a cache; causality hides the padding."""
    width = max(map(len, texts))
    return model(torch.tensor([[*text, *[0] * (width - len(text))] for text in texts]), path=path)[
        0
    ]


class Interleaving:
    """A cache that paths of a chain read into by turns, and what it must hold."""

    room = 20

    def __init__(self, model: Transformer, chain: tuple[ComputePath, ...], num_rows: int) -> None:
        self.model = model
        self.chain = chain
        self.cache = model.new_cache(num_rows, self.room)
        self.texts: list[list[int]] = [[] for _ in range(num_rows)]
        # Tokens of each row that each path's own layers (which no shorter path has) have run.
        self.done = [[0] * num_rows for _ in chain]

    def read(self, level: int, chunks: list[list[int]], extra: int, with_pending: bool) -> None:
        """A pass under a path, compared with a full one; ``extra`` columns are padding."""
        path = self.chain[level]
        held = [len(text) for text in self.texts]
        pending = [now - done for now, done in zip(held, self.done[level], strict=True)]
        if not any(map(len, chunks)) and not any(pending):
            return
        logits = self.logits(path, chunks, extra, with_pending)
        self.texts = [text + chunk for text, chunk in zip(self.texts, chunks, strict=True)]
        for own in self.done[: level + 1]:
            own[:] = map(len, self.texts)
        expected = full_pass(self.model, self.texts, path)
        parts = []
        for row, chunk in enumerate(chunks):
            first = held[row] - (pending[row] if with_pending else 0)
            num = held[row] + len(chunk) - first
            parts.append((logits[row, :num], expected[row, first : first + num]))
        assert_close(self.model, *map(torch.cat, zip(*parts, strict=True)))

    def logits(
        self, path: ComputePath, chunks: list[list[int]], extra: int, with_pending: bool
    ) -> Tensor:
        if any(map(len, chunks)):
            options = {"extra": extra, "with_pending": with_pending}
            return pass_of(self.model, chunks, self.cache, path=path, **options)
        empty = torch.zeros(len(chunks), 0, dtype=torch.int64)
        return self.model(empty, cache=self.cache, path=path, with_pending=with_pending).logits

    def truncate(self, lengths: Sequence[int]) -> None:
        self.cache.truncate(lengths)
        self.texts = [text[:length] for text, length in zip(self.texts, lengths, strict=True)]
        self.done = [list(map(min, own, lengths)) for own in self.done]

    def select(self, rows: list[int]) -> None:
        self.cache.select(rows)
        self.texts = [self.texts[row] for row in rows]
        self.done = [[own[row] for row in rows] for own in self.done]

    def check(self) -> None:
        """Each layer holds what it would if it had read its tokens in one pass."""
        if not any(self.texts):
            return
        model, cache, parts, layers_before = self.model, self.cache, [], 0
        fresh = model.new_cache(len(self.texts), self.room)
        pass_of(model, self.texts, fresh, path=self.chain[-1])
        for path, own in zip(self.chain, self.done, strict=True):
            layers = path.indices(model.config.num_layers)
            for layer in layers[layers_before:]:
                assert cache.lengths(layer) == tuple(own)
                kept = torch.arange(self.room) < torch.tensor(own)[:, None]  # [B, S]
                for found, expected in ((cache.keys, fresh.keys), (cache.values, fresh.values)):
                    parts.append([each[layer].transpose(1, 2)[kept] for each in (found, expected)])
            layers_before = len(layers)
        assert_close(model, *map(torch.cat, zip(*parts, strict=True)))


def interleave(data: st.DataObject) -> None:
    """Read, switch, forget, leave and copy at random."""
    kind = data.draw(st.sampled_from(["dense", "dense", "experts"]), label="model")
    model = model_of(kind, data.draw(st.sampled_from(list(LIMITS)), label="dtype"))
    chain = data.draw(st.sampled_from(CHAINS[kind]), label="chain")
    now = Interleaving(model, chain, data.draw(st.integers(1, 3), label="rows"))
    for _ in range(data.draw(st.integers(2, 6), label="operations")):
        rooms = [now.room - len(text) for text in now.texts]
        action = data.draw(st.sampled_from(["read"] * 5 + ["forget"] * 2 + ["select"]), label="do")
        if action == "read":
            most = [min(4, room) for room in rooms]
            counts = data.draw(st.tuples(*(st.integers(0, n) for n in most)), label="tokens")
            if data.draw(st.booleans(), label="equal"):
                counts = (min(counts),) * len(counts)
            seed = data.draw(st.integers(0, 9), label="text")
            chunks = [random_ids(n, 10 * row + seed) for row, n in enumerate(counts)]
            level = data.draw(st.integers(0, len(chain) - 1), label="path")
            extra, with_pending = data.draw(st.tuples(st.integers(0, 2), st.booleans()))
            now.read(level, chunks, extra, with_pending)
        elif action == "forget":
            lengths = [st.integers(max(0, len(text) - 5), len(text)) for text in now.texts]
            now.truncate(data.draw(st.tuples(*lengths), label="kept"))
        else:
            rows = st.integers(0, len(now.texts) - 1)
            now.select(data.draw(st.lists(rows, min_size=1, max_size=3), label="rows"))
    now.check()


@settings(max_examples=20, deadline=None)
@given(data=st.data())
@torch.no_grad()
def test_interleaved_paths_equal_a_full_pass(data: st.DataObject) -> None:
    interleave(data)


@pytest.mark.long
@settings(max_examples=1000, deadline=None)
@given(data=st.data())
@torch.no_grad()
def test_a_thousand_interleaved_sequences_equal_a_full_pass(data: st.DataObject) -> None:
    interleave(data)


NESTED = {  # the pairs of different paths of which the first begins the second
    "dense": [(a, b) for a, b in product(NAMES, NAMES) if WIDTHS[a] <= WIDTHS[b] and a != b],
    "experts": [*(("fast", name) for name in NAMES[1:]), ("expert", "deep")],
}


@pytest.mark.parametrize("kind", NESTED)
@torch.no_grad()
def test_every_ordered_pair_of_paths(kind: str) -> None:
    """It continues, and returns, or it is refused and nothing is changed."""
    model = model_of(kind, torch.float64)
    texts = [random_ids(9, row) for row in range(2)]
    parts = [
        [text[:n], text[n : n + 2], text[n + 2 : 9]] for text, n in zip(texts, (2, 6), strict=True)
    ]
    first, second, third = zip(*parts, strict=True)
    for before, after in product(NAMES, NAMES):
        cache = model.new_cache(2, 9)
        pass_of(model, first, cache, path=before)
        held = [cache.lengths(layer) for layer in range(4)]
        if before != after and not {(before, after), (after, before)} & set(NESTED[kind]):
            with pytest.raises(UltrathinkError, match="because neither begins with the other; pre"):
                pass_of(model, second, cache, path=after)
            assert held == [cache.lengths(layer) for layer in range(4)]
            after = before
        for path, chunks, start in ((after, second, (2, 6)), (before, third, (4, 8))):
            logits = pass_of(model, chunks, cache, path=path)
            expected = full_pass(model, texts, path)
            for row, (chunk, at) in enumerate(zip(chunks, start, strict=True)):
                assert_close(model, logits[row, : len(chunk)], expected[row, at : at + len(chunk)])


def test_a_cache_of_another_path_is_refused_in_a_sentence() -> None:
    """FAST has no experts, so its keys are not those of DEEP."""
    config = ModelConfig.model_validate(TINY | {"moe": mixture(FOUR, shared_size=16)})
    model = Transformer(config).eval()
    cache = model.new_cache(1, 9)
    ids = torch.tensor([[1, 2, 3]])
    model(ids, cache=cache, path="fast")
    with pytest.raises(UltrathinkError) as refusal:
        model(ids, cache=cache, path="deep")
    assert str(refusal.value) == (
        "the cache was filled by layers [0] (expert groups: none; top_k: 1) and cannot serve "
        "layers [0, 1] (expert groups: knowledge, skill, meta, safety; top_k: 1), because neither "
        "begins with the other; prefill a new cache under this path (new_cache(), or reset() this "
        "one)."
    )
    cache.reset()
    assert torch.equal(model(ids, cache=cache, path="deep").logits, model(ids).logits)


CHAINS_OF_NAMES = [
    ("dense", torch.float32, ("fast", "standard", "deep")),
    ("experts", torch.float32, ("fast", "expert", "deep")),
    *(
        pytest.param(kind, dtype, names, marks=pytest.mark.long)
        for kind, dtype, names in (
            ("dense", torch.float64, ("fast", "standard", "deep")),
            ("experts", torch.float64, ("fast", "expert", "deep")),
            ("experts", torch.float32, ("fast", "ultra_deep")),
            ("experts", torch.float32, ("fast", "standard")),
        )
    ),
]


@pytest.mark.parametrize(("kind", "dtype", "names"), CHAINS_OF_NAMES)
@torch.no_grad()
def test_two_hundred_greedy_tokens_of_paths_by_turns(
    kind: str, dtype: torch.dtype, names: tuple[str, ...]
) -> None:
    """Each token is the one that its path alone would have chosen; all pairs follow each other."""
    model = model_of(kind, dtype)
    texts = [random_ids(length, length) for length in (3, 8)]
    cache = model.new_cache(2, 210)
    turns = [name for pair in product(names, names) for name in pair]
    schedule = [turns[step // 5 % len(turns)] for step in range(200)]  # five tokens a turn
    unread: list[list[int]] = [list(text) for text in texts]
    for name in schedule:
        logits = pass_of(model, unread, cache, path=name, last_only=True)[:, -1]
        unread = [[token] for token in logits.argmax(-1).tolist()]
        texts = [text + token for text, token in zip(texts, unread, strict=True)]
    for name in names:
        best = full_pass(model, texts, name).argmax(-1)
        for text, choices, start in zip(texts, best.tolist(), (3, 8), strict=True):
            for step, chosen in enumerate(schedule):
                assert chosen != name or text[start + step] == choices[start + step - 1]


@contextmanager
def counted(model: Transformer) -> Iterator[list[int]]:
    """The rows times tokens that each layer runs."""
    counts = [0] * len(model.blocks)

    def count(layer: int, inputs: tuple[Any, ...]) -> None:
        counts[layer] += inputs[0].shape[0] * inputs[0].shape[1]

    hooks = [
        block.register_forward_pre_hook(lambda _, inputs, layer=layer: count(layer, inputs))
        for layer, block in enumerate(model.blocks)
    ]
    yield counts
    for hook in hooks:
        hook.remove()


def agreeing_model(kind: str) -> Transformer:
    """A model whose last layer changes little, so that drafts are often accepted."""
    model = copy.deepcopy(model_of(kind, torch.float32))
    last = model.blocks[3]
    for weight in (last.attention.output.weight, *last.feed_forward.parameters()):
        weight.data *= 0.5
    return model


@pytest.mark.parametrize("kind", CHAINS)
@torch.no_grad()
def test_drafts_of_a_shorter_path_give_the_tokens_of_the_longer(kind: str) -> None:
    """transformers 34240 (gibberish from a shared cache), mlxcel 994 (rewound by the wrong count),
    aprender 2014 (reset whole).

    Rows accept different numbers of drafts, and no layer runs a token twice.
    """
    model, num_drafts = agreeing_model(kind), 3
    prompts = [random_ids(length, length) for length in (3, 8)]
    texts = [list(prompt) for prompt in prompts]
    cache = model.new_cache(2, 900)  # one row may advance four times as fast
    best = pass_of(model, prompts, cache, path="deep", last_only=True)[:, -1].argmax(-1)
    texts = [[*text, token] for text, token in zip(texts, best.tolist(), strict=True)]
    accepted = []
    while min(map(len, texts)) < 208:
        with counted(model) as counts:
            unread, drafts = [text[-1:] for text in texts], []
            for _ in range(num_drafts):
                logits = pass_of(model, unread, cache, path="expert")[:, -1]
                unread = [[token] for token in logits.argmax(-1).tolist()]
                drafts.append(unread)
            logits = pass_of(model, unread, cache, path="deep", with_pending=True)
        assert counts == [2 * (num_drafts + 1)] * 4
        for row, choices in enumerate(logits.argmax(-1).tolist()):
            drafted = [draft[row][0] for draft in drafts]
            right = [a == b for a, b in zip(drafted, choices, strict=False)]
            accepted.append((*right, False).index(False))
            texts[row] += choices[: accepted[-1] + 1]
        held = tuple(len(text) - 1 for text in texts)
        cache.truncate(held)
        assert {cache.lengths(layer) for layer in range(4)} == {held}
    assert set(accepted) == {0, 1, 2, 3}
    expected = full_pass(model, texts, "deep").argmax(-1).tolist()
    for text, prompt, choices in zip(texts, prompts, expected, strict=True):
        assert text[len(prompt) :] == choices[len(prompt) - 1 : len(text) - 1]


@torch.no_grad()
def test_a_verification_that_fails_leaves_the_drafts_pending() -> None:
    """lattice 282 (left half verified): the cache is as before, and the next attempt is right."""
    model = model_of("dense", torch.float64)
    texts = [random_ids(9, row) for row in range(2)]
    cache = model.new_cache(2, 9)
    pass_of(model, [text[:3] for text in texts], cache, path="deep")
    pass_of(model, [texts[0][3:8], texts[1][3:5]], cache, path="fast")
    before = [cache.lengths(layer) for layer in range(4)]
    last = [texts[0][8:], texts[1][5:6]]

    def fail(*_: Any) -> None:
        raise RuntimeError("broken")

    for layer in (0, 1, 3):
        hook = model.blocks[layer].register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="broken"):
            pass_of(model, [[7], [8]], cache, path="deep", with_pending=True)
        hook.remove()
        assert before == [cache.lengths(layer) for layer in range(4)]
    logits = pass_of(model, last, cache, path="deep", with_pending=True)
    expected = full_pass(model, texts, "deep")
    assert_close(model, logits[0], expected[0, 3:9])
    assert_close(model, logits[1, :3], expected[1, 3:6])


@pytest.mark.parametrize("kept", [0, 2, 3, 4, 6])
@torch.no_grad()
def test_a_cache_with_pending_tokens_can_be_rewound(kept: int) -> None:
    """mlx-lm 1109 (not rewindable): to any length, before, at and within the pending tokens."""
    model = model_of("experts", torch.float64)
    texts = [random_ids(9, row) for row in range(2)]
    cache = model.new_cache(2, 9)
    for path, start, stop in (("deep", 0, 3), ("expert", 3, 5), ("fast", 5, 6)):
        pass_of(model, [text[start:stop] for text in texts], cache, path=path)
    cache.truncate([kept, 6])
    changed = [texts[0][:kept] + random_ids(3, 77), texts[1][:9]]
    logits = pass_of(model, [changed[0][kept:], changed[1][6:]], cache, path="deep")
    expected = full_pass(model, changed, "deep")
    assert_close(model, logits[0], expected[0, kept : kept + 3])
    assert_close(model, logits[1], expected[1, 6:])


@torch.no_grad()
def test_pending_tokens_leave_and_are_copied_with_their_sequences() -> None:
    model = model_of("dense", torch.float64)
    texts = [random_ids(8, row) for row in range(3)]
    cache = model.new_cache(3, 8)
    pass_of(model, [texts[0][:2], texts[1][:6], texts[2][:4]], cache, path="fast")
    cache.select([2, 1, 2, 0])
    kept = [texts[2], texts[1], texts[2], texts[0]]
    logits = pass_of(model, [kept[0][4:], kept[1][6:], [], kept[3][2:]], cache, with_pending=True)
    expected = full_pass(model, kept, "deep")
    for row, length in enumerate((8, 8, 4, 8)):
        assert_close(model, logits[row, :length], expected[row, :length])


@torch.no_grad()
def test_a_cache_remembers_the_longest_path_that_filled_it() -> None:
    model = model_of("experts", torch.float32)
    ids = torch.tensor([[1, 2, 3]])
    cache = model.new_cache(1, 9)
    for path in ("expert", "fast"):
        model(ids, cache=cache, path=path)
    with pytest.raises(UltrathinkError, match=r"filled by layers \[0, 1, 2\] \(.* skill, meta;"):
        model(ids, cache=cache, path="standard")


@torch.no_grad()
def test_states_are_kept_only_where_a_longer_path_may_need_them() -> None:
    model = model_of("dense", torch.float32)
    ids = torch.tensor([[1, 2, 3]])
    cache = model.new_cache(1, 6)
    for path in (None, "deep", ComputePath((1, 3))):
        cache.reset()
        model(ids, cache=cache, path=path)
        assert cache.states == {}
    cache.reset()
    with torch.inference_mode():
        model(ids, cache=cache, path="standard")
    assert {layer: states.shape for layer, states in cache.states.items()} == {2: (1, 6, 32)}
    found = model(ids, cache=cache, path="standard").logits  # outside of inference mode
    assert_close(model, found, model(torch.cat((ids, ids), 1), path="standard").logits[:, 3:])


@torch.no_grad()
def test_losses_and_tapped_states_are_those_of_the_input() -> None:
    model = model_of("experts", torch.float64)
    texts = [random_ids(9, row) for row in range(2)]
    cache = model.new_cache(2, 9)
    pass_of(model, [texts[0][:4], texts[1][:6]], cache, path="fast")
    ids = torch.tensor([texts[0][4:7], texts[1][6:9]])
    labels = (ids + 1) % VOCAB
    output = model(ids, labels, cache=cache, path="deep", tap=(0, 1, 3), with_pending=True)
    full = [model(torch.tensor([text]), tap=(0, 1, 3)) for text in texts]
    for layer, states in output.tapped.items():
        assert_close(model, states[0], full[0].tapped[layer][0, 4:7])
        assert_close(model, states[1], full[1].tapped[layer][0, 6:9])
    logits = torch.stack((full[0].logits[0, 4:7], full[1].logits[0, 6:9]))
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    assert_close(model, output.loss, expected)
    assert output.num_tokens == 6
    assert output.stats["expert_load"].sum(1).tolist() == [16 * 3] * 2  # of no padding


@torch.no_grad()
def test_positions_of_their_own_are_no_ground_for_a_longer_path() -> None:
    """The cache does not know them; a mask of keys it needs not to know."""
    model = model_of("dense", torch.float64)
    ids = torch.tensor([random_ids(6, 0)])
    positions = torch.tensor([1, 3, 5])
    cache = model.new_cache(1, 8)
    model(ids[:, :3], cache=cache, path="fast", positions=positions)
    with pytest.raises(UltrathinkError, match=r"read at positions=.*layer 1 cannot run.*prefill a"):
        model(ids[:, 3:], cache=cache)
    cache.reset()
    model(ids[:, :3], cache=cache, path="fast")
    with pytest.raises(ValueError, match=r"while the cache has pending.*input_ids of shape \[B, 0"):
        model(ids[:, 3:], cache=cache, positions=positions)
    assert model(ids[:, :0], cache=cache).logits.shape == (1, 0, VOCAB)
    logits = model(ids[:, 3:], cache=cache, positions=torch.tensor([3, 4, 5])).logits
    assert_close(model, logits, model(ids).logits[:, 3:])
    cache.reset()
    mask = torch.tensor([[True, False, True, True, False, True]])
    model(ids[:, :3], cache=cache, path="fast", attention_mask=mask[:, :3])
    logits = model(ids[:, 3:], cache=cache, attention_mask=mask).logits
    assert_close(model, logits, model(ids, attention_mask=mask).logits[:, 3:])
