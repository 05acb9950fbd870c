"""The sources of a configuration, scanned once, and the record of their content."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, repeat

from ultrathink.config.data import DataConfig, SourceConfig
from ultrathink.core.errors import DataError
from ultrathink.data.cache import cache_folder, store_key
from ultrathink.data.documents import Progress, Split
from ultrathink.data.record import MAX_FILES, DataRecord, SourceRecord
from ultrathink.data.sources.base import Source
from ultrathink.data.sources.opening import build_sources
from ultrathink.data.tokenizers.base import Tokenizer, behavior_hash


@dataclass(frozen=True)
class Sources:
    """The sources of a configuration, with an error in place of one that cannot be read."""

    train: list[Source | DataError]
    val: list[Source | DataError] | None
    """None where text of the training sources is held out."""

    @property
    def train_split(self) -> Split:
        """The split of a training source that is trained on."""
        return "train" if self.val is None else "all"

    @property
    def errors(self) -> list[DataError]:
        """The errors of the sources that cannot be read."""
        both = [*self.train, *(self.val or ())]
        return [source for source in both if isinstance(source, DataError)]

    def readable(self) -> tuple[list[Source], list[Source]]:
        """The sources of ``data.train`` and ``data.val``; raises the first error."""
        for error in self.errors:
            raise error
        groups = (self.train, self.val or [])
        train, val = ([s for s in group if not isinstance(s, DataError)] for group in groups)
        return train, val


def read_sources(data: DataConfig, progress: Progress | None = None) -> Sources:
    """Find the files that ``data`` names, and read those that the manifests do not know."""
    train, val = (
        [_scanned(source, data, progress) for source in build_sources(configs)]
        for configs in (data.train, data.val or ())
    )
    return Sources(train, None if data.val is None else val)


def read_source(config: SourceConfig, data: DataConfig, progress: Progress | None = None) -> Source:
    """A source that is not one of ``data``; DataError where it cannot be read."""
    [source] = build_sources([config])
    found = _scanned(source, data, progress)
    if isinstance(found, DataError):
        raise found
    return found


def _scanned(
    source: Source | DataError, data: DataConfig, progress: Progress | None
) -> Source | DataError:
    if isinstance(source, DataError):
        return source
    if progress is not None:
        progress(f"reading {source.name}", 0, 0)
    try:
        source.scan(cache_folder(data.cache_dir) / "sources", data.verify)
    except DataError as error:
        return error
    return source


def used_splits(config: SourceConfig, data: DataConfig) -> tuple[Split, ...]:
    """The splits of a source that are tokenized; ``val_fraction: 0`` holds nothing out."""
    if data.val is not None:
        return ("all",)
    return ("train",) if getattr(config, "val_fraction", None) == 0 else ("train", "val")


def record_sources(
    data: DataConfig, sources: Sources, tokenizer: Tokenizer, earlier: DataRecord | None = None
) -> DataRecord:
    """The content of ``sources``, and where their tokens are or would be.

    With ``earlier`` the record knows which files only grew since.
    """
    train, val = sources.readable()

    def recorded(
        found: Sequence[Source],
        configs: Sequence[SourceConfig],
        before: Sequence[SourceRecord] | None,
    ) -> tuple[SourceRecord, ...]:
        past = chain(before or (), repeat(None))  # None for a place that was not there then
        return tuple(
            record_source(source, config, used_splits(config, data), tokenizer, known)
            for source, config, known in zip(found, configs, past, strict=False)
        )

    skipped = Counter[str]()
    for source in (*train, *val):
        skipped[source.name] += source.num_skipped
    train_records = recorded(train, data.train, earlier.train if earlier else ())
    parts = [
        [record.fingerprints[sources.train_split] for record in train_records],
        tokenizer.fingerprint,
        data.packing.model_dump(mode="json"),
        data.seq_len,
    ]
    return DataRecord(
        train=train_records,
        val=None if data.val is None else recorded(val, data.val, earlier.val if earlier else ()),
        tokenizer=tokenizer.fingerprint,
        tokenizer_behavior=behavior_hash(tokenizer),
        data_hash=hashlib.sha256(json.dumps(parts).encode()).hexdigest(),
        skipped=dict(+skipped),  # without the zeros
    )


def record_source(
    source: Source,
    config: SourceConfig,
    splits: Sequence[Split],
    tokenizer: Tokenizer,
    before: SourceRecord | None = None,
) -> SourceRecord:
    """The content of one source; with ``before`` the record knows which files only grew."""
    files = source.files()
    then = (before and before.files) or {}
    prints: dict[Split, str] = {split: source.fingerprint(split) for split in splits}
    return SourceRecord(
        name=source.name,
        type=config.type,
        weight=config.weight,
        fingerprints=prints,
        stores={split: store_key(prints[split], split, tokenizer) for split in splits},
        num_documents=sum(summary.num_documents for summary in files.values()),
        num_bytes=sum(summary.num_bytes for summary in files.values()),
        files=files if len(files) <= MAX_FILES else None,
        grown=tuple(
            file
            for file, known in then.items()
            if file in files
            and files[file].num_documents > known.num_documents
            and source.begins_with(file, known)
        ),
    )
