"""From the configuration to the tokenizer and token stores, all cached by content."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ultrathink.config.data import DataConfig, SourceConfig
from ultrathink.config.tokenizer import TOKENIZERS, TokenizerConfig
from ultrathink.core.errors import CheckpointError, DataError
from ultrathink.data.cache import (
    TokenStore,
    cache_folder,
    cached_folder,
    open_or_build,
    writing_to,
)
from ultrathink.data.documents import Progress, Split
from ultrathink.data.packing import make_samples
from ultrathink.data.reading import Sources, read_source, read_sources, record_sources
from ultrathink.data.record import DataRecord, SourceRecord
from ultrathink.data.sources.base import Source
from ultrathink.data.tokenizers.base import DamagedTokenizerError, Tokenizer, load_tokenizer

_TRAINING_FORMAT = 1  # part of the key of trained tokenizers; raise it when training changes
_CHUNK_CHARACTERS = 10_000  # taken or left when there is more text than a tokenizer learns from


@dataclass(frozen=True)
class PreparedData:
    """What loaders need."""

    tokenizer: Tokenizer
    train_stores: list[TokenStore]
    val_stores: list[TokenStore]
    """Empty where nothing is held out."""
    num_samples: int
    """Sequences in an epoch: those of all training sources together."""
    record: DataRecord
    """What the data was, file by file; the run keeps it."""
    notes: list[str]
    """What was damaged in the cache and rebuilt."""


def prepare_data(
    data: DataConfig,
    tokenizer: TokenizerConfig | Tokenizer,
    *,
    progress: Progress | None = None,
) -> PreparedData:
    """Read the sources, train or load the tokenizer, and build or open the token stores.

    With ``data.val`` all text of the training sources is trained on and all text of the validation
    sources is scored; without it, a part of each training source is held out. A tokenizer learns
    from training text only; one that is given is used unchanged. DataError names a source that is
    unreadable or has too little text.
    """
    return prepare_sources(data, read_sources(data, progress), tokenizer, progress=progress)


def prepare_sources(
    data: DataConfig,
    sources: Sources,
    tokenizer: TokenizerConfig | Tokenizer,
    *,
    progress: Progress | None = None,
) -> PreparedData:
    """``prepare_data`` from ``sources``; raises the error of one that cannot be read."""
    cache = cache_folder(data.cache_dir)
    notes: list[str] = []
    train, val = sources.readable()
    for source in [*train, *val]:
        _require_text(source)
    if isinstance(tokenizer, TokenizerConfig):
        weights, split = [source.weight for source in data.train], sources.train_split
        tokenizer = train_or_load(tokenizer, train, split, weights, cache, progress, notes)
    chosen = tokenizer

    def open_store(_: SourceRecord, source: Source | None, split: Split) -> TokenStore:
        assert source is not None, "all were readable"
        store = open_or_build(source, split, chosen, cache, progress, notes, data.verify)
        if store.num_bytes == 0:
            raise _too_small(source, split)
        return store

    record = record_sources(data, sources, chosen)
    return assemble_data(data, chosen, record, sources, open_store, notes)


def prepare_text(
    config: SourceConfig,
    data: DataConfig,
    tokenizer: Tokenizer,
    progress: Progress | None,
    notes: list[str],
) -> TokenStore:
    """The tokens of all text of a further source, from the cache or built.

    DataError where it is unreadable or empty; ``notes`` gets what was rebuilt or skipped.
    """
    source = read_source(config, data, progress)
    _require_text(source)
    if source.num_skipped:
        notes.append(
            f"data source {source.name}: {source.num_skipped} items could not be read and were "
            f"skipped"
        )
    cache = cache_folder(data.cache_dir)
    return open_or_build(source, "all", tokenizer, cache, progress, notes, data.verify)


OpenStore = Callable[[SourceRecord, Source | None, Split], TokenStore]


def assemble_data(
    data: DataConfig,
    tokenizer: Tokenizer,
    record: DataRecord,
    sources: Sources,
    open_store: OpenStore,
    notes: list[str],
) -> PreparedData:
    """The data of ``record``, each store opened by ``open_store``.

    Its arguments are a source's record, the source where it can be read, and a split.
    """
    trained: Split = "train" if record.val is None else "all"
    train = _paired(record.train, sources.train)
    train_stores = [open_store(recorded, source, trained) for recorded, source in train]
    num_samples = sum(_count_samples(store, data) for store in train_stores)
    if record.val is None:
        val_stores = [open_store(*pair, "val") for pair in train if "val" in pair[0].stores]
    else:
        val = _paired(record.val, sources.val or [])
        val_stores = [open_store(*pair, "all") for pair in val]
    return PreparedData(
        tokenizer=tokenizer,
        train_stores=train_stores,
        val_stores=val_stores,
        num_samples=num_samples,
        record=record,
        notes=notes,
    )


def _paired(
    recorded: Sequence[SourceRecord], sources: Sequence[Source | DataError]
) -> list[tuple[SourceRecord, Source | None]]:
    """Each source's record with the source in its place, None where it cannot be read."""
    if len(recorded) != len(sources):
        return [(record, None) for record in recorded]
    found = [None if isinstance(source, DataError) else source for source in sources]
    return list(zip(recorded, found, strict=True))


def train_or_load(
    config: TokenizerConfig,
    sources: Sequence[Source],
    split: Split,
    weights: Sequence[float],
    cache: Path,
    progress: Progress | None = None,
    notes: list[str] | None = None,
) -> Tokenizer:
    """The tokenizer that ``config`` and the texts determine, from the cache or trained.

    A damaged one is retrained and ``notes`` says so.
    """
    prints = [source.fingerprint(split) for source in sources]
    sizes = [max(1, source.expected_bytes(split)) for source in sources]
    limit: int = getattr(config, "train_bytes", sum(sizes))
    # Weights decide only where there is more text than is learned from.
    shares = None if sum(sizes) <= limit else _shares(sizes, weights, limit)
    parts = [_TRAINING_FORMAT, config.model_dump(mode="json"), prints, shares]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache / "tokenizers" / key
    damage = None
    if folder.exists():
        try:
            return load_tokenizer(folder)
        except CheckpointError as error:
            damage = error.problem if isinstance(error, DamagedTokenizerError) else str(error)
    if progress is not None:
        progress("training tokenizer", 0, 0)
    texts = _texts_to_learn_from(sources, split, shares)
    tokenizer: Tokenizer = TOKENIZERS.load(config.type).train(config, texts)
    with writing_to(cache), cached_folder(folder, load_tokenizer) as beside:
        tokenizer.save(beside)
    if damage is not None and notes is not None:
        notes.append(f"the cached tokenizer was damaged ({damage}) and was retrained")
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
    """All texts, or chunks of them where ``shares`` are given.

    Chunks are spread evenly over a source: its first documents may be unlike the others.
    """
    for number, source in enumerate(sources):
        share = 1.0 if shares is None else shares[number]
        num_chunks, has_text = 0, False
        for document in source.documents(split):
            has_text = has_text or document.text != ""
            if share == 1:
                yield document.text
                continue
            for begin in range(0, len(document.text), _CHUNK_CHARACTERS):
                if math.ceil((num_chunks + 1) * share) > math.ceil(num_chunks * share):
                    yield document.text[begin : begin + _CHUNK_CHARACTERS]
                num_chunks += 1
        if not has_text:
            raise _too_small(source, split)


def _too_small(source: Source, split: Split) -> DataError:
    """The error where ``split`` has no text and the source has some."""
    if split == "val":
        return DataError(
            f"data source {source.name!r} is too small to hold out text for validation "
            f"({source.expected_bytes('all')} bytes in all). Name validation text in data.val, or "
            f"change the source's val_fraction (0: no validation)."
        )
    return DataError(
        f"data source {source.name!r} has no text left to train on once some is held out. "
        f"Name validation text in data.val, or lower the source's val_fraction."
    )


def _require_text(source: Source) -> None:
    if source.expected_bytes("all") > 0:
        return
    skipped = f"; {source.num_skipped} were skipped as unreadable" if source.num_skipped else ""
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
