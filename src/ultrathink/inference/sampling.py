"""Samples the next token from its logits.

Top-k https://arxiv.org/abs/1805.04833, top-p (nucleus) https://arxiv.org/abs/1904.09751.

Shapes: ``...`` any leading dimensions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ultrathink.core.errors import ConfigError


@dataclass(frozen=True)
class SamplingParams:
    """How a text is continued; ConfigError names a value that cannot be used."""

    max_new_tokens: int = 128
    """Tokens after which generation ends."""

    temperature: float = 0.8
    """Divides the logits; 0 always takes the most likely token."""

    top_k: int | None = None
    """Only this many of the most likely tokens can be sampled; None: no limit."""

    top_p: float | None = None
    """Only the most likely tokens that together reach this probability can be sampled."""

    seed: int | None = None
    """Makes sampling reproducible; None: different each time."""

    stop: tuple[str, ...] = ()
    """Texts before which generation ends; they are not part of the result."""

    def __post_init__(self) -> None:
        _check_integer("max_new_tokens", self.max_new_tokens, 1)
        _check_number("temperature", self.temperature, lambda x: x >= 0, "0 (greedy) or more")
        if self.top_k is not None:
            _check_integer("top_k", self.top_k, 1)
        if self.top_p is not None:
            _check_number("top_p", self.top_p, lambda x: 0 < x <= 1, "more than 0, up to 1")
        if self.seed is not None:
            _check_integer("seed", self.seed, 0)
        _check_stop(self.stop)
        object.__setattr__(self, "stop", tuple(self.stop))


def new_generator(seed: int | None) -> torch.Generator:
    """A generator for one generation, so that the global random state is unchanged."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def limit_vocabulary(logits: Tensor, vocab_size: int) -> Tensor:
    """``[..., V]`` with the ids from ``vocab_size`` on at minus infinity.

    A model's embedding may have more rows than its tokenizer has tokens.
    """
    if vocab_size >= logits.shape[-1]:
        return logits
    ids = torch.arange(logits.shape[-1], device=logits.device)
    return logits.masked_fill(ids >= vocab_size, float("-inf"))


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """``[..., V]`` with all but the ``top_k`` largest at minus infinity; among equals, any."""
    values, ids = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
    return torch.full_like(logits, float("-inf")).scatter(-1, ids, values)


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """``[..., V]`` with all but the most likely that together reach ``top_p`` at minus infinity.

    The most likely token always stays.
    """
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # mass of the tokens more likely than each
    beyond = before >= top_p
    beyond[..., 0] = False
    return torch.full_like(logits, float("-inf")).scatter(
        -1, ids, values.masked_fill(beyond, float("-inf"))
    )


def next_token_probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities ``[..., V]`` that ``sample`` draws from, in at least float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if params.temperature == 0:
        chosen = logits.argmax(-1, keepdim=True)
        return torch.zeros_like(logits).scatter(-1, chosen, 1.0)
    # The largest is subtracted first, so that a small temperature cannot overflow.
    logits = (logits - logits.amax(-1, keepdim=True)) / params.temperature
    if params.top_k is not None:
        logits = keep_top_k(logits, params.top_k)
    if params.top_p is not None and params.top_p < 1:
        logits = keep_top_p(logits, params.top_p)
    return logits.softmax(-1)


def sample(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """One token id from logits ``[V]``."""
    if params.temperature == 0:
        return int(logits.argmax())
    probabilities = next_token_probabilities(logits.cpu(), params)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def _check_stop(stop: object) -> None:
    is_list = isinstance(stop, tuple | list)
    if not is_list or not all(isinstance(text, str) for text in stop):  # type: ignore[attr-defined]
        raise ConfigError(f"stop is {stop!r}; give a tuple of texts, such as ('###',).")
    if "" in stop:  # type: ignore[operator]
        raise ConfigError("stop holds an empty text, which every text contains; remove it.")


def _check_integer(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} is {value!r}; use a whole number of at least {least}.")


def _check_number(name: str, value: Any, fits: Callable[[float], bool], advice: str) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not fits(value):
        raise ConfigError(f"{name} is {value!r}; use {advice}.")
