"""What a run was trained on: names, fingerprints and files, and what differs from that now."""

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
MAX_FILES = 20_000  # a source with more is recorded by its totals only
_MAX_LINES = 8


@dataclass(frozen=True)
class SourceRecord:
    """One source of ``data.train`` or ``data.val`` as it was read."""

    name: str
    type: str
    weight: float
    fingerprints: dict[Split, str]
    """Hash of the documents by split: ``train`` and ``val``, or ``all``."""
    stores: dict[Split, str]
    """The store in the token cache by split; a split that is not used has none."""
    num_documents: int
    num_bytes: int  # UTF-8 bytes of the documents
    files: dict[str, FileSummary] | None
    """What each file held, by its id, in the order of reading; None beyond 20,000 files."""
    grown: tuple[str, ...] = ()
    """Files that hold what they held in the record that this one is compared with, and more."""


@dataclass(frozen=True)
class DataRecord:
    """All that says what a run's samples were made of; kept as the run's ``data.json``."""

    train: tuple[SourceRecord, ...]
    val: tuple[SourceRecord, ...] | None
    """The sources of ``data.val``; None where text of the training sources is held out."""
    tokenizer: str
    """The tokenizer's fingerprint."""
    tokenizer_behavior: str
    """What ``behavior_hash`` gave for it."""
    data_hash: str
    skipped: dict[str, int]
    """Unreadable documents left out, by source."""

    @property
    def fingerprints(self) -> list[list[dict[Split, str]]]:
        """What the text was: equal where the same documents are trained and validated on."""
        return [[source.fingerprints for source in group] for group in (self.train, self.val or ())]

    def to_json(self) -> dict[str, Any]:
        """The record as JSON holds it, with a checksum; a file is a list, in its fields' order."""
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
                f"{path} is missing: it says what the run was trained on, and without it nobody "
                f"can tell whether the text is still the same. Put it back, or start a new run "
                f"with the weights of this one: training.init_from=RUN."
            ) from None
        except (OSError, ValueError) as error:
            raise _damaged(path, str(error)) from None
        return cls.from_json(values, path)


def describe_changes(before: DataRecord, now: DataRecord) -> list[str]:
    """One line for each difference in the text, naming sources and files; none where there is none.

    That a file only grew is known where ``now`` was made with ``before`` at hand. At most eight
    lines, and one that counts the others.
    """
    return shortened(
        [
            *_group_changes(before.train, now.train, "data.train"),
            *_group_changes(before.val or (), now.val or (), "data.val"),
        ]
    )


def source_changes(before: SourceRecord, now: SourceRecord) -> list[str]:
    """What differs in one source, a line for each file."""
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
    """The first eight of ``lines``, and how many more there are."""
    if len(lines) <= _MAX_LINES + 1:  # one more line says as much as "and 1 more"
        return list(lines)
    return [*lines[:_MAX_LINES], f"and {len(lines) - _MAX_LINES:,} more"]


def _group_changes(
    before: Sequence[SourceRecord], now: Sequence[SourceRecord], section: str
) -> list[str]:
    """What differs between the sources of a section: by place, or by name where the number does."""
    if len(before) == len(now):
        pairs = list(zip(before, now, strict=True))
        return [line for pair in pairs for line in source_changes(*pair)]
    then, here = ({source.name: source for source in group} for group in (before, now))
    lines = [f"source {name!r} of {section} is gone" for name in then if name not in here]
    lines += [f"source {name!r} of {section} is new" for name in here if name not in then]
    both = [(then[name], here[name]) for name in then if name in here]
    return lines + [line for pair in both for line in source_changes(*pair)]


def _file_changes(before: SourceRecord, now: SourceRecord) -> list[str]:
    """What happened to the files; nothing where they are the same or were not recorded."""
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
        f"{where} is damaged ({problem}): it says what the run was trained on. Put it back as it "
        f"was, or start a new run with the weights of this one: training.init_from=RUN."
    )
