"""The KV cache: keys and values of the tokens read so far, so that decoding computes only new ones.

A path that ends early leaves *pending* tokens behind: those that the further layers of a longer
path have not run. Their residual states are kept, so that a pass under the longer path takes them
through these layers; no token runs twice in a layer (https://arxiv.org/abs/2404.16710).

Shapes: B sequences, K key/value heads, S positions that fit, T tokens of a row, of which the first
ones are real and the rest is padding, D head dimension, C hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ultrathink.config.model import ModelConfig
from ultrathink.core.errors import UltrathinkError
from ultrathink.model.attention_mask import AttentionMask, causal_mask
from ultrathink.model.compute_path import ComputePath


class CacheFullError(UltrathinkError):
    """More tokens than the cache has room for."""


class Span(NamedTuple):
    """The tokens that some layers of a pass run: those from ``layer`` up to the next span's."""

    layer: int
    starts: tuple[int, ...]
    """The position of each row's first token."""
    lengths: tuple[int, ...]
    """The number of tokens of each row."""
    num_tokens: int
    """T, padding included."""


class CacheView(Protocol):
    """A model's interface to a cache, independent of its storage.

    A forward pass calls ``begin`` once, ``join`` before each layer where a later span begins,
    ``update`` and ``visible`` in each layer, and ``commit`` at the end. A pass that fails before
    ``commit`` changes nothing. Lengths differ between sequences and between layers: a layer that
    did not run holds nothing, and those after the exit of a shorter path fewer tokens.
    """

    batch_size: int

    def lengths(self, layer: int) -> tuple[int, ...]:
        """The tokens of each sequence that ``layer`` holds."""

    def begin(self, path: ComputePath, lengths: Sequence[int], num_tokens: int) -> tuple[Span, ...]:
        """Make room for the first ``lengths[b]`` of ``num_tokens`` tokens of each row ``b``.

        ``path`` is resolved. The first span is that of the new tokens. Another begins at each layer
        that has not run some tokens before them. Raises CacheFullError if they do not fit,
        UltrathinkError for another number of rows, for a path that neither begins the path of the
        tokens held nor begins with it, and if there is nothing to run.
        """

    def join(self, layer: int, x: Tensor) -> Tensor:
        """The states ``[B, T', C]`` of the span that begins at ``layer``: those of pending tokens,
        then, in each row, the real ones of the states ``x`` ``[B, T, C]`` of the span before."""

    def update(
        self, layer: int, key: Tensor, value: Tensor, present: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Append ``[B, K, T, D]``; returns all keys and values of ``layer``.

        They may have empty places, which ``visible`` excludes: also those of tokens that are not
        ``present`` (boolean ``[B, T]``), which pass the layer by.
        """

    def visible(self, layer: int) -> AttentionMask | None:
        """What each new token may see of that; None if causality with T = S, or a single query that
        sees everything, is sufficient."""

    def commit(self, states: Tensor | None) -> None:
        """Count the tokens of this pass as read, after every layer has stored them.

        ``states`` ``[B, T, C]`` are those after the last layer; with None no longer path can
        continue with these tokens.
        """

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget what each sequence holds beyond its first ``lengths[b]`` tokens, in all layers,
        pending tokens included.

        Raises UltrathinkError for a length that a sequence does not have.
        """


class _Stage(NamedTuple):
    """A span, and where its tokens are stored."""

    span: Span
    places: tuple[Tensor, Tensor, Tensor] | None
    """Row, token and position of all real tokens; None where each row fills up to the stop."""
    mask: AttentionMask | None


class _Pass(NamedTuple):
    """A forward pass from ``begin`` to ``commit``."""

    path: ComputePath
    """The longest that has filled the cache, after the pass."""
    exit: int
    """The last layer that runs."""
    after: tuple[int, ...]
    """The length of each sequence after the pass."""
    stop: int
    """The length of the longest."""
    stages: dict[int, _Stage]
    """What each layer runs."""
    joined: dict[int, int]
    """The layer before each one where a later span begins."""


class ContiguousCache:
    """A ``CacheView`` on preallocated keys and values, one pair ``[B, K, S, D]`` for each layer.

    The token at position p of a sequence is at index p. If all rows have equal length, the cache is
    one slice of the tensors, and attention needs only the causal mask. After the last layer of each
    path that ends before the model does, residual states ``[B, S, C]`` are kept; the whole model
    needs none. They are valid for pending tokens, which follow from the lengths of the layers.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        assert config.num_kv_heads is not None, "the configuration is resolved first"
        assert config.head_dim is not None, "the configuration is resolved first"
        if batch_size < 1 or max_length < 1:
            raise UltrathinkError(
                f"a cache needs batch_size and max_length of at least 1, not {batch_size} and "
                f"{max_length}."
            )
        self._config = config
        shape = (batch_size, config.num_kv_heads, max_length, config.head_dim)
        layers = range(config.num_layers)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.states: dict[int, Tensor] = {}
        self.present: dict[int, Tensor] = {}  # [B, S], of layers that tokens pass by
        self.batch_size = batch_size
        self.max_length = max_length
        self._lengths = [(0,) * batch_size for _ in layers]
        self._path: ComputePath | None = None  # the longest that filled it
        self._has_stateless = False  # tokens that no longer path can continue with
        self._pass: _Pass | None = None

    def lengths(self, layer: int) -> tuple[int, ...]:
        return self._lengths[layer]

    def begin(self, path: ComputePath, lengths: Sequence[int], num_tokens: int) -> tuple[Span, ...]:
        layers = path.indices(len(self._lengths))
        self._check_sequences(len(lengths))
        longest = self._longest(path)
        spans = find_spans(layers, self._lengths, lengths, num_tokens)
        before = spans[0].starts
        after = tuple(map(sum, zip(before, lengths, strict=True)))
        stop = max(after)
        if stop > self.max_length:
            row = after.index(stop)
            raise CacheFullError(
                f"the cache is full: it holds {before[row]} of {self.max_length} positions and "
                f"{lengths[row]} more were given; make it longer with new_cache(max_length="
                f"{stop}) or more."
            )
        if len(spans) > 1 and self._has_stateless:
            raise UltrathinkError(
                f"the cache holds tokens that were read at positions=..., which layer "
                f"{spans[1].layer} cannot run now; prefill a new cache under this path."
            )
        stages: dict[int, _Stage] = {}
        joined: dict[int, int] = {}
        begins = {span.layer: span for span in spans}
        for previous, layer in zip((-1, *layers), layers, strict=False):
            if layer in begins:
                stage = self._stage(begins[layer], stop)
                joined[layer] = previous
            stages[layer] = stage
        self._pass = _Pass(longest, layers[-1], after, stop, stages, joined)
        return spans

    def join(self, layer: int, x: Tensor) -> Tensor:
        now, (span, places, _) = self._running(layer)
        before = now.joined[layer]
        states = self._keep(before, now.stages[before], x)
        if places is None:
            return states[:, now.stop - span.num_tokens : now.stop]
        return tokens_from(states, span.starts, span.num_tokens)

    def update(
        self, layer: int, key: Tensor, value: Tensor, present: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        now, stage = self._running(layer)
        if present is not None:
            self._note_present(layer, now.stop, stage, present)
        keys, values = self.keys[layer][:, :, : now.stop], self.values[layer][:, :, : now.stop]
        if stage.places is None:
            start = now.stop - key.shape[2]
            keys[:, :, start:], values[:, :, start:] = key, value
        else:
            rows, tokens, positions = stage.places
            keys[rows, :, positions] = key[rows, :, tokens]
            values[rows, :, positions] = value[rows, :, tokens]
        return keys, values

    def visible(self, layer: int) -> AttentionMask | None:
        now, stage = self._running(layer)
        if layer not in self.present:
            return stage.mask  # one for all layers of a span
        seen = self.present[layer][:, None, None, : now.stop]
        if stage.mask is not None and stage.mask.dense is not None:
            seen = seen & stage.mask.dense
        elif stage.span.num_tokens > 1:
            seen = seen & causal_mask((0,), now.stop, now.stop, seen.device)
        # A token that passes by may see nothing; then it sees all, and is not used.
        return AttentionMask(dense=seen | ~seen.any(-1, keepdim=True))

    def commit(self, states: Tensor | None) -> None:
        now = self._pass
        assert now is not None, "begin opens a pass"
        if now.exit < len(self._lengths) - 1:  # longer paths exist
            if states is None:
                self._has_stateless = True
            else:
                self._keep(now.exit, now.stages[now.exit], states)
        self._path = now.path
        for layer in now.stages:
            self._lengths[layer] = now.after
        self._pass = None

    def truncate(self, lengths: Sequence[int]) -> None:
        self._check_sequences(len(lengths))
        held = tuple(map(max, zip(*self._lengths, strict=True)))
        for row, (length, most) in enumerate(zip(lengths, held, strict=True)):
            if not 0 <= length <= most:
                raise UltrathinkError(
                    f"sequence {row} of the cache has {most} tokens and cannot be truncated to "
                    f"{length}; use 0 to {most}."
                )
        self._lengths = [tuple(map(min, lengths, layer)) for layer in self._lengths]

    def select(self, rows: Sequence[int]) -> None:
        """Keep these sequences, in this order; a row listed twice is copied."""
        if not rows or not all(0 <= row < self.batch_size for row in rows):
            raise UltrathinkError(
                f"the cache has the sequences 0 to {self.batch_size - 1} and cannot keep "
                f"{list(rows)}."
            )
        index = torch.tensor(rows, device=self.keys[0].device)
        for tensors in (self.keys, self.values):
            for layer, tensor in enumerate(tensors):
                tensors[layer] = tensor[index]
        self.states = {layer: states[index] for layer, states in self.states.items()}
        self.present = {layer: present[index] for layer, present in self.present.items()}
        self._lengths = [tuple(lengths[row] for row in rows) for lengths in self._lengths]
        self.batch_size = len(rows)

    def reset(self) -> None:
        """Forget everything read; the memory is kept."""
        self.truncate((0,) * self.batch_size)

    def _note_present(self, layer: int, stop: int, stage: _Stage, present: Tensor) -> None:
        if layer not in self.present:
            shape = (self.batch_size, self.max_length)
            with torch.inference_mode(False):  # or later passes outside could not store theirs
                self.present[layer] = torch.zeros(shape, device=present.device, dtype=torch.bool)
        if stage.places is None:
            self.present[layer][:, stop - present.shape[1] : stop] = present
        else:
            rows, tokens, positions = stage.places
            self.present[layer][rows, positions] = present[rows, tokens]

    def _longest(self, path: ComputePath) -> ComputePath:
        """The longer one of ``path`` and the path of the tokens held."""
        if not any(map(any, self._lengths)):
            self._path, self._has_stateless = None, False
        held = self._path
        if held is None or held == path or held.is_prefix_of(path, self._config):
            return path
        if path.is_prefix_of(held, self._config):
            return held
        raise UltrathinkError(
            f"the cache was filled by {held.describe(self._config)} and cannot serve "
            f"{path.describe(self._config)}, because neither begins with the other; prefill a new "
            f"cache under this path (new_cache(), or reset() this one)."
        )

    def _stage(self, span: Span, stop: int) -> _Stage:
        _, starts, lengths, num_tokens = span
        device = self.keys[0].device
        if min(starts) == max(starts) == stop - num_tokens:
            mask = None
            if num_tokens not in (1, stop):
                mask = AttentionMask(dense=causal_mask(starts[:1], num_tokens, stop, device))
            return _Stage(span, None, mask)
        mask = AttentionMask(dense=causal_mask(starts, num_tokens, stop, device))
        return _Stage(span, _places(starts, lengths, device), mask)

    def _keep(self, layer: int, stage: _Stage, x: Tensor) -> Tensor:
        """Store the states after ``layer``; returns all of that layer, ``[B, S, C]``."""
        assert self._pass is not None, "begin opens a pass"
        if layer not in self.states:
            shape = (self.batch_size, self.max_length, x.shape[2])
            with torch.inference_mode(False):  # or later passes outside could not store theirs
                self.states[layer] = torch.zeros(shape, device=x.device, dtype=x.dtype)
        states = self.states[layer]
        if stage.places is None:
            states[:, self._pass.stop - x.shape[1] : self._pass.stop] = x
        else:
            rows, tokens, positions = stage.places
            states[rows, positions] = x[rows, tokens]
        return states

    def _running(self, layer: int) -> tuple[_Pass, _Stage]:
        assert self._pass is not None, "begin opens a pass"
        assert layer in self._pass.stages, "only layers of the path store keys"
        return self._pass, self._pass.stages[layer]

    def _check_sequences(self, given: int) -> None:
        if given != self.batch_size:
            raise UltrathinkError(
                f"the cache holds {self.batch_size} sequences, the input has {given}; make "
                f"another with new_cache(batch_size={given}, ...)."
            )


def find_spans(
    layers: Sequence[int],
    held: Sequence[tuple[int, ...]],
    lengths: Sequence[int],
    num_tokens: int,
) -> tuple[Span, ...]:
    """The spans of a pass through ``layers``, of which each holds ``held[layer]`` tokens, with
    ``lengths[b]`` of ``num_tokens`` new tokens in row ``b``.

    Raises UltrathinkError if there is neither a new nor a pending token.
    """
    spans = [Span(layers[0], held[layers[0]], tuple(lengths), num_tokens)]
    after = [start + length for start, length in zip(held[layers[0]], lengths, strict=True)]
    for layer in layers:
        if held[layer] != spans[-1].starts:
            missing = tuple(stop - start for stop, start in zip(after, held[layer], strict=True))
            spans.append(Span(layer, held[layer], missing, max(missing)))
    if not any(spans[-1].lengths):
        raise UltrathinkError(
            "there is nothing to run: input_ids has no tokens, and none of the cache is pending."
        )
    return tuple(spans)


def tokens_from(x: Tensor, starts: Sequence[int], num_tokens: int) -> Tensor:
    """``num_tokens`` tokens of each row of ``x`` ``[B, T, C]``, from ``starts[b]``; beyond the end
    the last one is repeated."""
    columns = torch.tensor(starts, device=x.device)[:, None]
    columns = columns + torch.arange(num_tokens, device=x.device)
    rows = torch.arange(len(x), device=x.device)[:, None]
    return x[rows, columns.clamp(max=x.shape[1] - 1)]


def _places(
    before: Sequence[int], lengths: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Row, token and position of all real tokens of a pass, int64 each."""
    found = [
        (row, token, start + token)
        for row, (start, length) in enumerate(zip(before, lengths, strict=True))
        for token in range(length)
    ]
    rows, tokens, positions = torch.tensor(found, dtype=torch.int64).view(-1, 3).T.to(device)
    return rows, tokens, positions
