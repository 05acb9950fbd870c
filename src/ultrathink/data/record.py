"""The record of what a run was trained on, and how the data differs from it now."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, Self

from ultrathink.core.errors import CheckpointError
from ultrathink.core.files import write_atomic
from ultrathink.data.checksums import sealed, unsealed
from ultrathink.data.documents import FileSummary, Split, file_label

FORMAT = 2
MAX_FILES = 20_000  # a source with more is recorded without its files
_MAX_LINES = 8


@dataclass(frozen=True)
class SourceRecord:
    """One source of ``data.train`` or ``data.val`` when it was read."""

    name: str
    type: str
    weight: float
    fingerprints: dict[Split, str]
    """Hash of the documents by split: ``train`` and ``val``, or ``all``."""
    stores: dict[Split, str]
    """The store in the token cache by split, for splits that are used."""
    num_documents: int
    num_bytes: int  # UTF-8 bytes of the documents
    files: dict[str, FileSummary] | None
    """What each file held, by id, in the order of reading; None beyond 20,000 files."""
    grown: tuple[str, ...] = ()
    """Files that only grew since the record that this one is compared with."""


@dataclass(frozen=True)
class DataRecord:
    """What a run's samples were made of; the run keeps it as ``data.json``."""

    train: tuple[SourceRecord, ...]
    val: tuple[SourceRecord, ...] | None
    """The sources of ``data.val``; None where text of the training sources is held out."""
    tokenizer: str
    """The tokenizer's fingerprint."""
    tokenizer_behavior: str
    """What ``behavior_hash`` gave for it."""
    data_hash: str
    """Hash of what the samples consist of: contents, tokenizer, packing and ``seq_len``."""
    skipped: dict[str, int]
    """Unreadable documents left out (``on_bad: skip``), by source."""

    @property
    def weights(self) -> list[float]:
        """The weight of each training source."""
        return [source.weight for source in self.train]

    @property
    def fingerprints(self) -> list[list[dict[Split, str]]]:
        """Equal where the same documents are trained and validated on."""
        return [[source.fingerprints for source in group] for group in (self.train, self.val or ())]

    def to_json(self) -> dict[str, Any]:
        """The record as JSON with a checksum; a file is the list of its fields."""
        values = asdict(self)
        values["train"] = [_source_to_json(source) for source in self.train]
        if self.val is not None:
            values["val"] = [_source_to_json(source) for source in self.val]
        return sealed({"format": FORMAT, **values})

    @classmethod
    def from_json(cls, values: Any, where: str | Path = "data.json") -> Self:
        """Read back what ``to_json`` gave; CheckpointError, naming ``where``, for anything else."""
        fields = unsealed(values)
        if fields is None:
            raise _damaged(where, "its content is not what was written")
        if (found := fields.pop("format", None)) != FORMAT:
            raise CheckpointError(
                f"{where} has format {found!r}, this version reads {FORMAT}; "
                f"use the version of ultrathink that wrote it."
            )
        fields["train"] = tuple(_source_from_json(source) for source in fields["train"])
        if fields["val"] is not None:
            fields["val"] = tuple(_source_from_json(source) for source in fields["val"])
        return cls(**fields)

    def write(self, path: Path) -> None:
        """Write the record to ``path``, whole or not at all."""
        write_atomic(path, json.dumps(self.to_json(), ensure_ascii=False, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read back what ``write`` wrote; CheckpointError where it is missing or damaged."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(
                f"{path} is missing: it records what the run was trained on, without which a "
                f"change of the text goes unnoticed. Restore it, or start a new run from the "
                f"weights of this one: training.init_from=RUN."
            ) from None
        except (OSError, ValueError) as error:
            raise _damaged(path, str(error)) from None
        return cls.from_json(values, path)


def describe_changes(before: DataRecord, now: DataRecord) -> list[str]:
    """A line for each difference in the text, with source and file: at most eight, and a count.

    That a file only grew is known where ``now`` was recorded with ``before``.
    """
    return shortened(
        [
            *_group_changes(before.train, now.train, "data.train"),
            *_group_changes(before.val or (), now.val or (), "data.val"),
        ]
    )


def source_changes(before: SourceRecord, now: SourceRecord) -> list[str]:
    """What differs in one source, a line a file."""
    lines = []
    if before.type != now.type:
        lines.append(f"source {now.name!r}: type {before.type} then, {now.type} now")
    if before.weight != now.weight:
        lines.append(f"source {now.name!r}: weight {before.weight:g} then, {now.weight:g} now")
    if before.fingerprints == now.fingerprints:
        return lines
    changed = [] if before.type != now.type else _file_changes(before, now)
    return lines + (changed or [_other_text(before, now)])


def shortened(lines: Sequence[str]) -> list[str]:
    """The first eight of ``lines``, and the number of the others."""
    if len(lines) <= _MAX_LINES + 1:  # one more line says as much as "and 1 more"
        return list(lines)
    return [*lines[:_MAX_LINES], f"and {len(lines) - _MAX_LINES:,} more"]


def _group_changes(
    before: Sequence[SourceRecord], now: Sequence[SourceRecord], section: str
) -> list[str]:
    """What differs between a section's sources, matched by place, or by name if one is missing."""
    if len(before) == len(now):
        pairs = list(zip(before, now, strict=True))
        return [line for pair in pairs for line in source_changes(*pair)]
    then, here = ({source.name: source for source in group} for group in (before, now))
    lines = [f"source {name!r} of {section} is gone" for name in then if name not in here]
    lines += [f"source {name!r} of {section} is new" for name in here if name not in then]
    both = [(then[name], here[name]) for name in then if name in here]
    return lines + [line for pair in both for line in source_changes(*pair)]


def _file_changes(before: SourceRecord, now: SourceRecord) -> list[str]:
    """How the files changed; empty where they are the same or were not recorded."""
    then, here = before.files, now.files
    if then is None or here is None:
        return []
    is_only = len({**then, **here}) == 1
    lines = []
    for file in {**then, **here}:
        label = file_label(now.name, file, is_only=is_only)
        if file not in here:
            lines.append(f"{label} is gone")
        elif file not in then:
            lines.append(f"{label} is new")
        elif then[file].digest != here[file].digest:
            change = _content_change(then[file], here[file], grew=file in now.grown)
            lines.append(f"{label} {change}")
    if not lines and list(then) != list(here):
        lines.append(f"source {now.name!r}: its files come in another order")
    return lines


def _content_change(then: FileSummary, here: FileSummary, *, grew: bool) -> str:
    more = here.num_documents - then.num_documents
    if grew:
        return f"grew by {more:,} document{'s' if more > 1 else ''}"
    if then.num_documents == here.num_documents == 1:
        return f"changed ({_then_and_now(then.num_bytes, here.num_bytes, 'bytes')})"
    return f"changed ({_then_and_now(then.num_documents, here.num_documents, 'documents')})"


def _then_and_now(then: int, here: int, unit: str) -> str:
    return f"{then:,} {unit} then, {here:,} now" if then != here else f"still {then:,} {unit}"


def _other_text(before: SourceRecord, now: SourceRecord) -> str:
    if before.files is not None and before.files == now.files:
        return f"source {now.name!r}: another part of its text is held out for validation"
    return (
        f"source {now.name!r} has other text ("
        f"{_then_and_now(before.num_documents, now.num_documents, 'documents')}; "
        f"{_then_and_now(before.num_bytes, now.num_bytes, 'bytes')})"
    )


def _source_to_json(source: SourceRecord) -> dict[str, Any]:
    values = asdict(source)
    del values["grown"]
    if source.files is not None:
        values["files"] = {file: list(astuple(found)) for file, found in source.files.items()}
    return values


def _source_from_json(values: dict[str, Any]) -> SourceRecord:
    fields = dict(values)
    if fields["files"] is not None:
        fields["files"] = {file: FileSummary(*summary) for file, summary in fields["files"].items()}
    return SourceRecord(**fields)


def _damaged(where: str | Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{where} is damaged ({problem}): it records what the run was trained on. Restore it, or "
        f"start a new run from the weights of this one: training.init_from=RUN."
    )
