"""The data of a resumed run, if its text or its configuration has changed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ultrathink.config.options import Effect
from ultrathink.config.schema import Config
from ultrathink.core.errors import CheckpointError
from ultrathink.data.documents import Progress
from ultrathink.data.prepare import PreparedData, prepare_data
from ultrathink.data.record import DataRecord
from ultrathink.data.resume import resume_data
from ultrathink.data.tokenizers.base import Tokenizer
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.segments import ConfigChange


@dataclass(frozen=True)
class FoundData:
    """The data to train on, and how it differs from the run's earlier data."""

    data: PreparedData
    other_samples: bool  # the training text, or how it is cut into samples
    other_scores: bool  # any of that, or the validation text
    notes: tuple[str, ...]


def data_to_resume_with(
    run: RunFolder,
    config: Config,
    changes: Sequence[ConfigChange],
    data_hash: str,
    tokenizer: Tokenizer,
    progress: Progress | None,
) -> FoundData:
    """The data of ``config``, compared with that of the checkpoint's ``data_hash``.

    Other data is accepted if the configuration changed it, or ``data.on_change`` allows it;
    otherwise an error names what changed.
    """
    if decided(changes, "samples"):  # changed by the user, not by accident
        data = prepare_data(config.data, tokenizer, progress=progress)
        is_other = data.record.data_hash != data_hash
        return FoundData(data, is_other, is_other, tuple(data.notes))
    found = resume_data(config.data, tokenizer, _record_of(run, data_hash), progress=progress)
    is_other = found.action == "rebuild"
    notes = (*found.data.notes, *(f"the data changed: {text}" for text in found.changes))
    return FoundData(found.data, found.data.record.data_hash != data_hash, is_other, notes)


def keep_record(run: RunFolder, data: PreparedData) -> None:
    """Write the record of the data used from now on; a record of other data is kept beside it."""
    with suppress(CheckpointError):
        before = DataRecord.read(run.data_record)
        if before.data_hash != data.record.data_hash:
            run.data_record.rename(_beside(run, before.data_hash))
    data.record.write(run.data_record)


def _record_of(run: RunFolder, data_hash: str) -> DataRecord:
    """The record of a checkpoint's data: the newest one, or an earlier one."""
    earlier = _beside(run, data_hash)
    return DataRecord.read(earlier if earlier.exists() else run.data_record)


def _beside(run: RunFolder, data_hash: str) -> Path:
    return run.path / f"data-{data_hash[:12]}.json"


def decided(changes: Sequence[ConfigChange], *effects: Effect) -> bool:
    """Whether one of ``changes`` has one of ``effects``."""
    return any(not change.decides.isdisjoint(effects) for change in changes)


def touches(changes: Sequence[ConfigChange], *keys: str) -> bool:
    """Whether one of ``changes`` is to one of ``keys`` or to a key in it."""
    return any(f"{change.key}.".startswith(f"{key}.") for change in changes for key in keys)
