"""The data of a resumed run: unchanged, or what ``data.on_change`` chooses where it changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ultrathink.config.data import DataConfig
from ultrathink.core.errors import CheckpointError, DataError
from ultrathink.data.cache import (
    DamagedStoreError,
    TokenStore,
    cache_folder,
    cached_store,
    open_or_build,
)
from ultrathink.data.documents import Progress, Split, UnreadableSourceError
from ultrathink.data.prepare import PreparedData, assemble_data, prepare_sources
from ultrathink.data.reading import Sources, read_sources, record_source, record_sources
from ultrathink.data.record import (
    DataRecord,
    SourceRecord,
    describe_changes,
    shortened,
    source_changes,
)
from ultrathink.data.sources.base import Source
from ultrathink.data.tokenizers.base import Tokenizer, behavior_hash


@dataclass(frozen=True)
class ResumedData:
    """The data to resume with, and why."""

    data: PreparedData
    changes: list[str]
    """What differs from the record, a line each; with ``same`` at most weights."""
    action: Literal["same", "rebuild", "keep"]
    """``same``: the text is unchanged; otherwise the ``data.on_change`` that was applied."""


def resume_data(
    data: DataConfig,
    tokenizer: Tokenizer,
    record: DataRecord,
    *,
    progress: Progress | None = None,
) -> ResumedData:
    """Prepare the data of a resumed run, comparing the text with ``record``.

    Where the text changed, ``data.on_change`` decides; ``keep`` gives the stores, weights and
    ``data_hash`` of the record, even without the sources. CheckpointError names what changed and
    the remedies, or what is missing in the cache. A source may have moved.
    """
    _require_same_tokenizer(tokenizer, record)
    sources = read_sources(data, progress)
    is_same, changes = _compare(data, sources, tokenizer, record)
    if not is_same and data.on_change == "keep":
        prepared = _keep(data, sources, tokenizer, record, changes, progress)
        return ResumedData(prepared, changes, "keep")
    if not is_same and (sources.errors or data.on_change == "refuse"):
        raise CheckpointError(_refusal(data, sources, changes))
    prepared = prepare_sources(data, sources, tokenizer, progress=progress)
    return ResumedData(prepared, changes, "same" if is_same else "rebuild")


class DataFinding(NamedTuple):
    """A finding about the text or the tokens of a run."""

    item: str
    status: Literal["ok", "note", "damaged"]
    detail: str


def check_data(data: DataConfig, tokenizer: Tokenizer, record: DataRecord) -> list[DataFinding]:
    """Verify the text and the token stores of ``record``, reading every byte."""
    findings = []
    cache = cache_folder(data.cache_dir)
    for source in (*record.train, *(record.val or ())):
        for split, key in source.stores.items():
            item, folder = f"tokens of {source.name} ({split})", cached_store(cache, key)
            try:
                store = TokenStore(folder, source.name, "full")
            except DamagedStoreError as error:
                status: Literal["note", "damaged"] = "damaged" if folder.exists() else "note"
                problem = f"{folder}: {error}" if folder.exists() else f"{folder} is missing"
                advice = "the next start rebuilds it if the text is unchanged"
                findings.append(DataFinding(item, status, f"{problem}; {advice}"))
            else:
                detail = f"{store.num_tokens:,}, unchanged"
                findings.append(DataFinding(item, "ok", detail))
    sources = read_sources(data.model_copy(update={"verify": "full"}))
    is_same, changes = _compare(data, sources, tokenizer, record)
    if is_same:
        return [*findings, DataFinding("text", "ok", "unchanged since the run was trained")]
    return findings + [DataFinding("text", "note", f"changed since: {line}") for line in changes]


def _compare(
    data: DataConfig, sources: Sources, tokenizer: Tokenizer, record: DataRecord
) -> tuple[bool, list[str]]:
    """Whether the text equals that of ``record``, and what differs."""
    if sources.errors:
        return False, _changes_and_errors(data, sources, tokenizer, record)
    now = record_sources(data, sources, tokenizer, earlier=record)
    return now.fingerprints == record.fingerprints, describe_changes(record, now)


def _require_same_tokenizer(tokenizer: Tokenizer, record: DataRecord) -> None:
    if tokenizer.fingerprint != record.tokenizer:
        raise CheckpointError(
            f"the tokenizer is not the one that the run was trained with (fingerprint "
            f"{record.tokenizer[:12]} then, {tokenizer.fingerprint[:12]} now); restore the run's "
            f"tokenizer folder."
        )
    behavior = behavior_hash(tokenizer)
    if behavior != record.tokenizer_behavior:
        raise CheckpointError(
            f"this version of the code or its libraries splits text into other tokens than the "
            f"version that the run was trained with ({record.tokenizer_behavior[:12]} then, "
            f"{behavior[:12]} now); resume with the versions in the run's manifest.json."
        )


def _changes_and_errors(
    data: DataConfig, sources: Sources, tokenizer: Tokenizer, record: DataRecord
) -> list[str]:
    """What happened to each source, where some can no longer be read."""
    lines: list[str] = []
    groups = ((sources.train, data.train, record.train), (sources.val, data.val, record.val))
    for found, configs, recorded in groups:
        for place, source in enumerate(found or ()):
            if isinstance(source, UnreadableSourceError):
                lines.append(source.problem)
            elif isinstance(source, DataError):
                lines.append(str(source).removesuffix("."))
            elif recorded is not None and configs is not None and len(recorded) == len(configs):
                before, config = recorded[place], configs[place]
                splits = tuple(before.fingerprints)
                now = record_source(source, config, splits, tokenizer, before)
                lines += source_changes(before, now)
    return shortened(lines)


def _refusal(data: DataConfig, sources: Sources, changes: Sequence[str]) -> str:
    remedies = [
        "Restore the files",
        "resume with data.on_change=keep (use the tokens cached then)",
    ]
    if not sources.errors:
        remedies.append("resume with data.on_change=rebuild (train on the new text from here)")
    elif data.on_change == "rebuild":
        remedies[0] = f"data.on_change=rebuild needs text that can be read. {remedies[0]}"
    return f"the data changed since this run began: {'; '.join(changes)}. {', or '.join(remedies)}."


def _keep(
    data: DataConfig,
    sources: Sources,
    tokenizer: Tokenizer,
    record: DataRecord,
    changes: Sequence[str],
    progress: Progress | None,
) -> PreparedData:
    """The data of ``record`` from the token cache; a store of an unchanged source is rebuilt."""
    cache = cache_folder(data.cache_dir)
    notes: list[str] = []

    def open_store(recorded: SourceRecord, source: Source | None, split: Split) -> TokenStore:
        folder = cached_store(cache, recorded.stores[split])
        try:
            return TokenStore(folder, recorded.name, data.verify)
        except DamagedStoreError as error:
            damage = str(error)
        if source is not None and source.fingerprint(split) == recorded.fingerprints[split]:
            return open_or_build(source, split, tokenizer, cache, progress, notes, data.verify)
        state = f"is damaged ({damage})" if folder.exists() else "is missing"
        raise CheckpointError(
            f"data.on_change=keep uses the tokens cached when the run began, but the store of "
            f"{recorded.name} ({split}), {folder}, {state} and cannot be rebuilt: "
            f"{'; '.join(changes)}. Restore the files or that folder, or name the cache that has "
            f"it with data.cache_dir, or resume with data.on_change=rebuild (train on the new "
            f"text from here)."
        )

    return assemble_data(data, tokenizer, record, sources, open_store, notes)
