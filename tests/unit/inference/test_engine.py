"""Generating text: the same as a loop without a cache, whole characters, stop texts."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.model.experts.mixtures import FOUR, mixture
from ultrathink.config.model import ModelConfig
from ultrathink.inference.engine import Engine, Generation
from ultrathink.inference.sampling import SamplingParams
from ultrathink.inference.text_stream import TextStream
from ultrathink.model.output import ModelOutput
from ultrathink.model.transformer import Transformer


class Bytes:
    """One token a byte, and 256 for the end of a text."""

    vocab_size = 257
    eot_id = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return bytes(i for i in ids if i != self.eot_id)


class Script(torch.nn.Module):
    """Stands in for a model: predicts the bytes of a text, one after the other."""

    def __init__(self, text: bytes | list[int]) -> None:
        super().__init__()
        self.ids = list(text)
        self.device = torch.device("cpu")
        self.reads: list[list[int]] = []

    def new_cache(self, batch_size: int, max_length: int) -> None:
        return None

    def forward(self, input_ids: torch.Tensor, **options: Any) -> ModelOutput:
        logits = torch.zeros(1, 1, 300)
        logits[..., 299] = 5.0  # beyond the vocabulary: never to be drawn
        logits[..., self.ids[len(self.reads)]] = 3.0
        self.reads.append(input_ids[0].tolist())
        assert torch.is_inference_mode_enabled()
        assert not self.training
        return ModelOutput(logits=logits)


GREEDY = SamplingParams(temperature=0, max_new_tokens=24)


SHAPE = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "vocab_size": 272,
    "init": {"std": 0.2},
}


def make_model(**changes: Any) -> Transformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Transformer(ModelConfig.model_validate(SHAPE | changes))


@pytest.fixture
def model() -> Transformer:
    return make_model()


@cache
def double_model(kind: str) -> Transformer:
    """One model for many examples, in a precision in which no two tokens are equally likely."""
    moe = {"moe": mixture(FOUR)} if kind == "experts" else {}
    return make_model(**moe).double()


def scripted(text: str | bytes | list[int], **options: Any) -> tuple[list[str], Generation]:
    """The pieces and the generation of a model that says ``text``."""
    script = text.encode() if isinstance(text, str) else text
    params = SamplingParams(temperature=0, max_new_tokens=len(script), **options)
    pieces = list(Engine(Script(script), Bytes()).stream("go", params))  # type: ignore[arg-type]
    generation = Engine(Script(script), Bytes()).generate("go", params)  # type: ignore[arg-type]
    assert "".join(pieces) == generation.text
    assert all(pieces)
    return pieces, generation


def test_greedy_text_equals_a_loop_without_a_cache(model: Transformer) -> None:
    tokenizer, new = Bytes(), []
    ids = tokenizer.encode("Once upon a time, é")
    with torch.no_grad():
        while len(new) < 24 and 256 not in new:
            logits = model(torch.tensor([ids + new])).logits[0, -1, :257]
            new.append(int(logits.argmax()))
    generation = Engine(model, tokenizer).generate("Once upon a time, é", GREEDY)
    expected = tokenizer.decode_bytes(new).decode(errors="replace").rstrip("\ufffd")
    assert generation.text.rstrip("\ufffd") == expected
    assert (generation.prompt_tokens, generation.new_tokens) == (len(ids), len(new))


PROMPTS = st.lists(st.text(alphabet="abcé ", max_size=12), max_size=4)


@settings(max_examples=15, deadline=None)
@given(prompts=PROMPTS, temperature=st.sampled_from([0.0, 1.5]), data=st.data())
def test_prompts_of_any_lengths_are_continued_as_each_alone(
    prompts: list[str], temperature: float, data: st.DataObject
) -> None:
    """Texts end at different times, by a stop text, the end-of-text token or their length."""
    model = data.draw(st.sampled_from(["dense", "experts"]).map(double_model))
    params = SamplingParams(temperature=temperature, max_new_tokens=12, seed=3, stop=("a", "\x07"))
    engine = Engine(model, Bytes())
    together = engine.generate(prompts, params)
    assert together == [engine.generate(prompt, params) for prompt in prompts]
    assert all(isinstance(generation, Generation) for generation in together)


def test_a_batch_reads_no_more_of_a_finished_text() -> None:
    model = double_model("dense")
    engine, widths = Engine(model, Bytes()), []
    lone = engine.generate("a", GREEDY)
    assert lone.finish_reason == "length"
    stop = lone.text[2:4]
    hook = model.register_forward_pre_hook(lambda _, args: widths.append(tuple(args[0].shape)))
    try:
        params = SamplingParams(temperature=0, max_new_tokens=24, stop=(stop,))
        first, second = engine.generate(["a", "bcd"], params)
    finally:
        hook.remove()
    assert first.finish_reason == "stop"
    assert widths[0] == (2, 3)
    ends = sorted([first.new_tokens, second.new_tokens])
    assert ends[0] < ends[1], "the comparison needs texts of different lengths"
    assert widths[1:] == [(2, 1)] * (ends[0] - 1) + [(1, 1)] * (ends[1] - ends[0])


def test_a_prompt_longer_than_the_rotary_tables(model: Transformer) -> None:
    from ultrathink.model.rope import INITIAL_POSITIONS

    generation = Engine(model, Bytes()).generate(
        "a" * INITIAL_POSITIONS, SamplingParams(max_new_tokens=2, temperature=0)
    )
    assert generation.prompt_tokens == INITIAL_POSITIONS


def test_a_seed_repeats_a_text(model: Transformer) -> None:
    engine, before = Engine(model, Bytes()), torch.get_rng_state()
    seeded = [SamplingParams(seed=seed, temperature=1.0, max_new_tokens=32) for seed in (1, 2)]
    texts = [engine.generate("a", params).text for params in seeded]
    assert texts[0] == engine.generate("a", seeded[0]).text
    assert texts[0] == "".join(engine.stream("a", seeded[0]))
    assert len({*texts, *(engine.generate("a").text for _ in range(2))}) == 4
    assert torch.equal(before, torch.get_rng_state())


def test_characters_come_whole() -> None:
    text = "naïve 漢字 🎈 end"
    assert scripted(text)[0] == list(text)


@pytest.mark.parametrize(
    ("script", "expected", "reason"),
    [
        ("ab🎈".encode()[:-1], "ab", "length"),  # half a character at the end
        (b"a\xffb", "a\ufffdb", "length"),
        ([*b"ab", 256, *b"cd"], "ab", "end_of_text"),
        ([*b"EN", 256], "EN", "end_of_text"),
    ],
)
def test_how_a_text_ends(script: Any, expected: str, reason: str) -> None:
    _, generation = scripted(script, stop=("END",))
    assert (generation.text, generation.finish_reason) == (expected, reason)
    is_ended = reason == "end_of_text"  # by a token that counts as well
    assert generation.new_tokens == (len(expected) + 1 if is_ended else len(script))


@pytest.mark.parametrize(
    ("text", "stop", "expected", "new_tokens"),
    [
        ("one END two", ("END",), "one ", 7),  # spans three tokens
        ("one EN END", ("END",), "one EN ", 10),  # a false start
        ("aab", ("ab",), "a", 3),  # restarts inside a false start
        ("abcd", ("bcx", "c"), "ab", 3),  # the other one is the match
        ("漢字だ", ("字",), "漢", 6),
    ],
)
def test_a_stop_text_is_never_given_out(
    text: str, stop: tuple[str, ...], expected: str, new_tokens: int
) -> None:
    pieces, generation = scripted(text, stop=stop)
    assert generation == Generation(expected, 2, new_tokens, "stop")
    assert "".join(pieces) == expected


@given(
    text=st.text(alphabet="abé🎈", max_size=30),
    stop=st.lists(st.text(alphabet="abé🎈", min_size=1, max_size=4), max_size=3),
    cuts=st.sets(st.integers(1, 100)),
)
def test_pieces_equal_cutting_the_whole_text(text: str, stop: list[str], cuts: set[int]) -> None:
    stream = TextStream(tuple(stop))
    data = text.encode()
    edges = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
    shown = ""
    for start, end in pairwise(edges):
        shown += stream.push(data[start:end])
        assert text.startswith(shown)
        assert not any(mark in shown for mark in stop)
    shown += stream.finish()
    # A stop text ends the text as soon as it is complete, whichever begins first.
    assert stream.stopped == any(mark in text for mark in stop)
    if not stream.stopped:
        assert shown == text


def test_the_mode_of_each_module_comes_back(model: Transformer) -> None:
    engine = Engine(model, Bytes())
    model.train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    engine.generate("a", GREEDY)
    assert [module.training for module in model.modules()] == modes
    stream = engine.stream("a", GREEDY)
    next(stream)
    assert not torch.is_inference_mode_enabled()
    assert not model.training
    stream.close()  # type: ignore[attr-defined]
    assert [module.training for module in model.modules()] == modes

    class Broken(Bytes):
        def decode_bytes(self, ids: Iterable[int]) -> bytes:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        Engine(model, Broken()).generate("a", GREEDY)
    assert [module.training for module in model.modules()] == modes
    ids = torch.tensor([[1, 2, 3]])
    model(ids, ids).loss.backward()  # nothing of inference mode is left
    assert all(parameter.grad is not None for parameter in model.parameters())
