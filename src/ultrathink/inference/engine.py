"""Generates text with a model.

Shapes: B prompts, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, overload

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
from ultrathink.model.compute_path import ComputePath
from ultrathink.model.transformer import Transformer

if TYPE_CHECKING:
    from ultrathink.data.tokenizers.base import Tokenizer

Path = str | ComputePath | None
FinishReason = Literal["stop", "length", "end_of_text"]


@dataclass(frozen=True)
class Generation:
    """A continuation: its text without the prompt, and why it ended."""

    text: str
    prompt_tokens: int
    """Tokens read before the first new one."""
    new_tokens: int
    """Sampled tokens, including those of a stop text and the end-of-text token."""
    finish_reason: FinishReason


class Engine:
    """Generates text from a model and its tokenizer, for one prompt or a batch of them.

    The model is not changed: neither its weights nor the mode of any module. With ``in_training``
    training can continue with the model afterwards: weights gathered from other processes are then
    not inference-mode tensors, which training could not use.
    """

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, *, in_training: bool = False
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._without_gradients = torch.no_grad if in_training else torch.inference_mode

    @overload
    def generate(
        self, prompts: str, params: SamplingParams | None = None, *, path: Path = None
    ) -> Generation: ...

    @overload
    def generate(
        self, prompts: list[str], params: SamplingParams | None = None, *, path: Path = None
    ) -> list[Generation]: ...

    def generate(
        self, prompts: str | list[str], params: SamplingParams | None = None, *, path: Path = None
    ) -> Generation | list[Generation]:
        """Continue one prompt, or several of any lengths in one batch, each as if it were alone.

        ``path`` is the part of the model that computes; None is all of it.
        An empty prompt starts from the end-of-text token. With a seed, every prompt uses the random
        numbers of that seed.
        """
        if isinstance(prompts, str):
            return self.generate([prompts], params, path=path)[0]
        texts = [_Continuation(self.tokenizer, prompt, params) for prompt in prompts]
        for _ in self._decode(texts, path):
            pass
        return [text.generation() for text in texts]

    def stream(
        self, prompt: str, params: SamplingParams | None = None, *, path: Path = None
    ) -> Iterator[str]:
        """The text of ``generate`` in chunks, each as soon as it is certain.

        Chunks contain whole characters, and nothing of a stop text. The model is in evaluation mode
        until the iterator is exhausted or closed.
        """
        text = _Continuation(self.tokenizer, prompt, params)
        num_shown = 0
        with closing(self._decode([text], path)) as steps:
            for _ in steps:
                yield from text.chunks[num_shown:]
                num_shown = len(text.chunks)

    def _decode(self, texts: list[_Continuation], path: Path) -> Generator[None, None, None]:
        """Add a token to each unfinished text until all are finished, yielding after each round."""
        if not texts:
            return
        with _evaluation_mode(self.model):
            cache = self.model.new_cache(len(texts), max(text.max_length for text in texts))
            while True:
                for text, logits in zip(texts, self._next_logits(texts, cache, path), strict=True):
                    text.draw(logits)
                yield
                rows = [row for row, text in enumerate(texts) if text.finish_reason is None]
                if not rows:
                    return
                if len(rows) < len(texts):
                    cache.select(rows)
                    texts = [texts[row] for row in rows]

    def _next_logits(self, texts: list[_Continuation], cache: CacheView, path: Path) -> Tensor:
        """Logits ``[B, V]`` of the token after the unread tokens of each text, which it reads now.

        Inference mode is limited to this call: around a ``yield`` it would affect the caller.
        """
        lengths = [len(text.unread) for text in texts]
        rows = [text.unread + [0] * (max(lengths) - len(text.unread)) for text in texts]
        with self._without_gradients():
            input_ids = torch.tensor(rows, device=self.model.device)
            output = self.model(input_ids, lengths=lengths, cache=cache, path=path, last_only=True)
            logits = output.logits
            assert logits is not None, "no labels were given"
            return limit_vocabulary(logits[:, -1], self.tokenizer.vocab_size)


class _Continuation:
    """One prompt and the text generated so far."""

    def __init__(self, tokenizer: Tokenizer, prompt: str, params: SamplingParams | None) -> None:
        self.tokenizer = tokenizer
        self.params = params or SamplingParams()
        self.unread = tokenizer.encode(prompt) or [tokenizer.eot_id]
        self.prompt_tokens = len(self.unread)
        self.new_tokens = 0
        self.chunks: list[str] = []
        self.finish_reason: FinishReason | None = None
        self._generator = new_generator(self.params.seed)
        self._stream = TextStream(self.params.stop)

    @property
    def max_length(self) -> int:
        """Tokens of the prompt and of the longest possible text."""
        return self.prompt_tokens + self.params.max_new_tokens

    def draw(self, logits: Tensor) -> None:
        """Sample the next token from its logits ``[V]``, and check whether it is the last."""
        token = sample(logits, self.params, self._generator)
        self.unread = [token]
        self.new_tokens += 1
        if token == self.tokenizer.eot_id:
            self.finish_reason = "end_of_text"
        else:
            self._add(self._stream.push(self.tokenizer.decode_bytes(self.unread)))
            if self._stream.stopped:
                self.finish_reason = "stop"
            elif self.new_tokens == self.params.max_new_tokens:
                self.finish_reason = "length"
        if self.finish_reason is not None:
            self._add(self._stream.finish())

    def generation(self) -> Generation:
        """The finished text."""
        assert self.finish_reason is not None, "the text is finished"
        text = "".join(self.chunks)
        return Generation(text, self.prompt_tokens, self.new_tokens, self.finish_reason)

    def _add(self, chunk: str) -> None:
        if chunk:
            self.chunks.append(chunk)


@contextmanager
def _evaluation_mode(model: Transformer) -> Iterator[None]:
    """Evaluation mode inside; afterwards each module's own mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
