"""From the configuration to tokenizer and token stores, everything cached by content."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultrathink.config.data import SOURCES, DataConfig, SourceConfig
from ultrathink.config.tokenizer import TOKENIZERS, TokenizerConfig
from ultrathink.core.errors import CheckpointError, DataError
from ultrathink.data.cache import TokenStore, cache_folder, open_or_build
from ultrathink.data.documents import Progress, Source, Split
from ultrathink.data.packing import make_samples
from ultrathink.data.tokenizers.base import Tokenizer, load_tokenizer

_TRAINING_FORMAT = 1  # part of the key of trained tokenizers; raise it when training changes
_PIECE_CHARACTERS = 10_000  # what is taken or left when there is more text than is learned from


@dataclass(frozen=True)
class PreparedData:
    """All that loaders need."""

    tokenizer: Tokenizer
    train_stores: list[TokenStore]
    train_weights: list[float]
    val_stores: list[TokenStore]
    """Empty where nothing is held out."""
    num_samples: int
    """Sequences in an epoch: those of all training sources together."""
    source_names: list[str]
    """Names of the training sources: ``Batch.source_ids`` counts them."""
    data_hash: str
    """Hash of what the samples consist of: contents, tokenizer, packing and ``seq_len``."""
    skipped: dict[str, int]
    """Unreadable documents left out (``on_bad: skip``) by source, where there are any."""


def prepare_data(
    data: DataConfig,
    tokenizer: TokenizerConfig | Tokenizer,
    *,
    progress: Progress | None = None,
) -> PreparedData:
    """Read the sources, train or load the tokenizer, and build or open the token stores.

    With ``data.val`` the training sources are trained on whole and every document of the
    validation sources is scored; without it, the held-out split of each training source is.
    A tokenizer learns from training text only; one that is given is used as it is.
    DataError names a source that is unreadable or has too little text.
    """
    cache = cache_folder(data.cache_dir)
    train_split: Split = "train" if data.val is None else "all"
    train = build_sources(data.train)
    val = train if data.val is None else build_sources(data.val)
    for source in dict.fromkeys([*train, *val]):
        if progress is not None:
            progress(f"reading {source.name}", 0, 0)
        _require_text(source, train_split if source in train else "all")
    weights = [source.weight for source in data.train]
    if isinstance(tokenizer, TokenizerConfig):
        tokenizer = train_or_load(tokenizer, train, train_split, weights, cache, progress)
    train_stores = [
        open_or_build(source, train_split, tokenizer, cache, progress) for source in train
    ]
    num_samples = sum(_count_samples(store, data) for store in train_stores)
    if data.val is None:
        val_stores = _held_out_stores(train, data, tokenizer, cache, progress)
    else:
        val_stores = [open_or_build(source, "all", tokenizer, cache, progress) for source in val]
    parts: list[Any] = [
        [source.fingerprint(train_split) for source in train],
        tokenizer.fingerprint,
        data.packing.model_dump(mode="json"),
        data.seq_len,
    ]
    return PreparedData(
        tokenizer=tokenizer,
        train_stores=train_stores,
        train_weights=weights,
        val_stores=val_stores,
        num_samples=num_samples,
        source_names=[source.name for source in train],
        data_hash=hashlib.sha256(json.dumps(parts).encode()).hexdigest(),
        skipped=_skipped(dict.fromkeys([*train, *val])),
    )


def build_sources(configs: Sequence[SourceConfig]) -> list[Source]:
    """The sources that ``configs`` describe; names that come up again are numbered."""
    sources: list[Source] = []
    taken = {config.name for config in configs if config.name is not None}
    for config in configs:
        source: Source = SOURCES.load(config.type)(config)
        if config.name is None:
            base, number = source.name, 2
            while source.name in taken:
                source.name, number = f"{base}-{number}", number + 1
            taken.add(source.name)
        sources.append(source)
    return sources


def train_or_load(
    config: TokenizerConfig,
    sources: Sequence[Source],
    split: Split,
    weights: Sequence[float],
    cache: Path,
    progress: Progress | None = None,
) -> Tokenizer:
    """The tokenizer that ``config`` and the texts determine, from the cache where it is there."""
    prints = [source.fingerprint(split) for source in sources]
    sizes = [source.num_bytes(split) for source in sources]
    limit: int = getattr(config, "train_bytes", sum(sizes))
    # Weights decide only where there is more text than is learned from.
    shares = None if sum(sizes) <= limit else _shares(sizes, weights, limit)
    parts = [_TRAINING_FORMAT, config.model_dump(mode="json"), prints, shares]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache / "tokenizers" / key
    with suppress(CheckpointError):  # not there, or damaged: it is trained again
        return load_tokenizer(folder)
    if progress is not None:
        progress("training tokenizer", 0, 0)
    texts = _texts_to_learn_from(sources, split, shares)
    tokenizer: Tokenizer = TOKENIZERS.load(config.type).train(config, texts)
    # Written beside and renamed, so that another process never sees half of it.
    beside = folder.with_name(f".{key}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        tokenizer.save(beside)
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # another process was first, with the same content
            beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return tokenizer


def _shares(sizes: Sequence[int], weights: Sequence[float], limit: int) -> list[float]:
    """Share of each source's text that is learned from: its weight's part of ``limit`` bytes."""
    total = sum(weights)
    return [
        min(1.0, limit * weight / total / size) for size, weight in zip(sizes, weights, strict=True)
    ]


def _texts_to_learn_from(
    sources: Sequence[Source], split: Split, shares: Sequence[float] | None
) -> Iterator[str]:
    """All texts, or where ``shares`` are given pieces of them.

    Pieces are spread evenly over all of a source: its first documents alone would say little
    of the others.
    """
    for number, source in enumerate(sources):
        share = 1.0 if shares is None else shares[number]
        num_pieces = 0
        for document in source.documents(split):
            if share == 1:
                yield document.text
                continue
            for begin in range(0, len(document.text), _PIECE_CHARACTERS):
                if math.ceil((num_pieces + 1) * share) > math.ceil(num_pieces * share):
                    yield document.text[begin : begin + _PIECE_CHARACTERS]
                num_pieces += 1


def _held_out_stores(
    sources: Sequence[Source],
    data: DataConfig,
    tokenizer: Tokenizer,
    cache: Path,
    progress: Progress | None,
) -> list[TokenStore]:
    """Stores of the validation splits; a source with ``val_fraction: 0`` has none, as asked."""
    stores = []
    for source, config in zip(sources, data.train, strict=True):
        if getattr(config, "val_fraction", None) == 0:
            continue
        if source.num_bytes("val") == 0:
            raise DataError(
                f"data source {source.name!r} is too small to hold out text for validation "
                f"({source.num_bytes('all')} bytes in all). Name validation text in data.val, or "
                f"change the source's val_fraction (0: no validation)."
            )
        stores.append(open_or_build(source, "val", tokenizer, cache, progress))
    return stores


def _require_text(source: Source, split: Split) -> None:
    if source.num_bytes(split) > 0:
        return
    skipped = f"; {source.num_skipped} were skipped as unreadable" if source.num_skipped else ""
    if source.num_bytes("all") > 0:
        raise DataError(
            f"data source {source.name!r} has no text left to train on once some is held out. "
            f"Name validation text in data.val, or lower the source's val_fraction."
        )
    raise DataError(
        f"data source {source.name!r} has no text: its documents are empty or there are "
        f"none{skipped}. Point it at other files."
    )


def _count_samples(store: TokenStore, data: DataConfig) -> int:
    """Sequences in a training store; DataError where there is not one."""
    num_samples = make_samples(store, data.seq_len, data.packing).num_samples
    too_short = data.packing.enabled and store.num_tokens <= data.seq_len
    if too_short or num_samples == 0:
        raise DataError(
            f"data source {store.name!r} has {store.num_tokens} training tokens; one sequence "
            f"of data.seq_len {data.seq_len} needs {data.seq_len + 1}. Add text, or lower "
            f"data.seq_len."
        )
    return num_samples


def _skipped(sources: Iterable[Source]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for source in sources:
        if source.num_skipped:
            counts[source.name] = counts.get(source.name, 0) + source.num_skipped
    return counts
