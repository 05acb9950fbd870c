"""Continuing a text with a model.

Shapes: B batch (1 here), T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ultrathink.inference.sampling import (
    SamplingParams,
    limit_vocabulary,
    new_generator,
    sample,
)
from ultrathink.inference.text_stream import TextStream
from ultrathink.model.cache import CacheView
from ultrathink.model.transformer import Transformer

if TYPE_CHECKING:
    from ultrathink.data.tokenizers.base import Tokenizer

FinishReason = Literal["stop", "length", "end_of_text"]


@dataclass(frozen=True)
class Generation:
    """A continuation: its text without the prompt, and how it came to an end."""

    text: str
    prompt_tokens: int
    """Tokens the model read before the first new one."""
    new_tokens: int
    """Tokens drawn, those of a stop text and the end-of-text token included."""
    finish_reason: FinishReason


class Engine:
    """Generates text from a model and its tokenizer, one prompt at a time.

    The model stays as it was: its weights, and the training or evaluation mode of each module.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer

    def generate(self, prompt: str, params: SamplingParams | None = None) -> Generation:
        """Continue ``prompt``; an empty one starts from the end-of-text token."""
        run = self._run(prompt, params or SamplingParams())
        while True:
            try:
                next(run)
            except StopIteration as end:
                generation: Generation = end.value
                return generation

    def stream(self, prompt: str, params: SamplingParams | None = None) -> Iterator[str]:
        """The text of ``generate`` in pieces, each as soon as it is certain.

        A piece ends between characters, and nothing of a stop text appears in one. The model is in
        evaluation mode until the iterator is exhausted or closed.
        """
        yield from self._run(prompt, params or SamplingParams())

    def _run(self, prompt: str, params: SamplingParams) -> Generator[str, None, Generation]:
        ids = self.tokenizer.encode(prompt) or [self.tokenizer.eot_id]
        generator = new_generator(params.seed)
        text = TextStream(params.stop)
        pieces: list[str] = []
        reason: FinishReason = "length"
        num_new = 0
        with _evaluation_mode(self.model):
            cache = self.model.new_cache(1, len(ids) + params.max_new_tokens)
            unread = ids
            while num_new < params.max_new_tokens:
                token = sample(self._next_logits(unread, cache), params, generator)
                unread = [token]
                num_new += 1
                if token == self.tokenizer.eot_id:
                    reason = "end_of_text"
                    break
                piece = text.push(self.tokenizer.decode_bytes(unread))
                if piece:
                    pieces.append(piece)
                    yield piece
                if text.stopped:
                    reason = "stop"
                    break
            rest = text.finish()
            if rest:
                pieces.append(rest)
                yield rest
        return Generation("".join(pieces), len(ids), num_new, reason)

    @torch.inference_mode()
    def _next_logits(self, ids: list[int], cache: CacheView) -> Tensor:
        """Logits ``[V]`` of the token after ``ids``, which the cache reads now.

        Inference mode lasts for this call only: around a ``yield`` it would reach the caller.
        """
        input_ids = torch.tensor([ids], device=self.model.device)
        logits = self.model(input_ids, cache=cache, last_only=True).logits[0, -1]
        return limit_vocabulary(logits, self.tokenizer.vocab_size)


@contextmanager
def _evaluation_mode(model: Transformer) -> Iterator[None]:
    """Evaluation mode, and each module's own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
