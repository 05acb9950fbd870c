"""Checks the whole content of a run folder: reads everything, changes nothing."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ultrathink.checkpoint.format import DamagedCheckpointError, read_state, verify_checkpoint
from ultrathink.checkpoint.snapshots import problems_of_snapshots, snapshot_path
from ultrathink.config.loading import CONFIG_FILE
from ultrathink.config.schema import Config
from ultrathink.core.errors import CheckpointError, UltrathinkError
from ultrathink.data.record import DataRecord
from ultrathink.data.resume import check_data
from ultrathink.data.tokenizers.base import Tokenizer, load_tokenizer
from ultrathink.runs.folder import RunFolder, find_run
from ultrathink.runs.listing import size_on_disk
from ultrathink.runs.loading import check_loads
from ultrathink.runs.lock import Owner, holder
from ultrathink.runs.metrics_check import Status, check_metrics
from ultrathink.runs.reading import RunReader, in_run
from ultrathink.runs.segments import Segment

Found = TypeVar("Found")
_MAX_TRIES = 5
_UNFINISHED = re.compile(r"^\..+\.(tmp|old|deleted)$")


@dataclass(frozen=True)
class CheckedItem:
    """The result for one part of a run folder; a ``note`` is no damage."""

    item: str  # a path inside the run folder
    status: Status
    detail: str


@dataclass(frozen=True)
class Check:
    """The results for a run folder, and its newest sound checkpoint."""

    run: RunFolder
    owner: Owner | None
    findings: tuple[CheckedItem, ...]
    newest_sound: int | None  # step
    newest: int | None  # step, sound or not

    @property
    def is_sound(self) -> bool:
        return all(finding.status != "damaged" for finding in self.findings)

    @property
    def can_resume(self) -> bool:
        """Whether the configuration and the tokenizer, which every checkpoint needs, exist."""
        needed = (CONFIG_FILE, "tokenizer")
        damaged = [f.item for f in self.findings if f.status == "damaged"]
        return self.newest_sound is not None and not any(item in needed for item in damaged)


def run_to_check(name: str) -> RunFolder:
    """The run called ``name``, even if its configuration is missing."""
    try:
        return find_run(name)
    except CheckpointError:
        for path in (Path(name), Path("runs") / name):
            if (path / "checkpoints").is_dir():
                return RunFolder(path)
        raise


def check_run(run: RunFolder, which: str | None = None, *, data: bool = False) -> Check:
    """Check all of ``run``, or only the checkpoint ``which`` and the files it needs.

    With ``data`` also check its text and its part of the token cache.
    """
    owner, reader = holder(run), RunReader(run)
    findings: list[CheckedItem] = []

    def read(
        item: str, part: Callable[[], Found], described: Callable[[Found], str]
    ) -> Found | None:
        """Note a part of the run as ok, with a description, or as damaged."""
        try:
            found = part()
        except (UltrathinkError, OSError) as error:
            findings.append(CheckedItem(item, "damaged", in_run(run, error)))
            return None
        findings.append(CheckedItem(item, "ok", described(found)))
        return found

    config = read(CONFIG_FILE, run.read_config, lambda config: "can be used")
    manifest = read(run.manifest.name, reader.manifest, lambda it: f"made {it.get('created')}")
    wanted_hash = (manifest or {}).get("tokenizer_hash")
    tokenizer = read(
        run.tokenizer.name,
        lambda: _own_tokenizer(run, wanted_hash),
        lambda tokenizer: f"{tokenizer.vocab_size:,} tokens",
    )
    if which is None and run.data_record.exists():
        read(run.data_record.name, reader.data_record, lambda record: "can be read")
    if which is None and run.segments.exists():
        read(run.segments.name, reader.segments, lambda it: f"can be read{_felt_changes(it)}")
    if data and config is not None and tokenizer is not None:
        findings += _check_data(run, config, tokenizer)
    tokenizer_hash = None if tokenizer is None else tokenizer.fingerprint
    found: dict[int, CheckedItem] = {}
    for _ in range(_MAX_TRIES):
        steps = {step: run.step_path(step) for step in run.step_folders()}
        chosen = list(steps) if which is None else [_step_named(run, which, steps)]
        for step in sorted(chosen, reverse=True):
            finding = _check_checkpoint(run, step, steps[step], config, tokenizer_hash)
            if finding is not None:
                found[step] = finding
        if found or not steps:
            break  # otherwise a running training dropped them all meanwhile, and has new ones
    for step in sorted(found):
        findings.append(found[step])
        if found[step].status != "damaged":
            findings += _check_snapshots(run, steps[step])
    sound = [step for step in found if found[step].status != "damaged"]
    if which is None:
        if not steps:
            findings.append(CheckedItem("checkpoints", "note", "there is none yet"))
        _check_links(run, steps, found.keys() - set(sound), findings)
        findings += [
            CheckedItem(run.metrics.name, status, detail)
            for status, detail in check_metrics(run, config, max(steps, default=0))
        ]
        if owner is None:  # otherwise they are being written
            _note_leftovers(run, findings)
    return Check(run, owner, tuple(findings), max(sound, default=None), max(steps, default=None))


def _own_tokenizer(run: RunFolder, wanted_hash: Any) -> Tokenizer:
    """The run's tokenizer; CheckpointError if it differs from that of the manifest."""
    tokenizer = load_tokenizer(run.tokenizer)
    if wanted_hash not in (None, tokenizer.fingerprint):
        raise CheckpointError(
            f"it is not the tokenizer of the run (hash {tokenizer.fingerprint[:12]}, "
            f"{run.manifest.name} has {str(wanted_hash)[:12]})"
        )
    return tokenizer


def _felt_changes(segments: Sequence[Segment]) -> str:
    """The changes of the segments that affect training, as the end of a sentence."""
    felt = [
        f"after step {segment.from_step:,} {'; '.join(map(str, segment.felt))}"
        for segment in segments
        if segment.felt
    ]
    return f"; changes that affect training: {', '.join(felt)}" if felt else ""


def _check_data(run: RunFolder, config: Config, tokenizer: Tokenizer) -> list[CheckedItem]:
    """Compare text and token stores with the run's training data."""
    try:
        record = DataRecord.read(run.data_record)
        found = check_data(config.data, tokenizer, record)
    except CheckpointError as error:
        return [CheckedItem(run.data_record.name, "damaged", in_run(run, error))]
    return [CheckedItem(*finding) for finding in found]


# -- checkpoints ----------------------------------------------------------------------------------


def _step_named(run: RunFolder, which: str, steps: dict[int, Path]) -> int:
    """The step of ``which``; otherwise CheckpointError lists the steps."""
    if which.isdigit() and int(which) in steps:
        return int(which)
    name = run.checkpoint(which).name
    return next(step for step, path in steps.items() if path.name == name)


def _check_checkpoint(
    run: RunFolder, step: int, folder: Path, config: Config | None, tokenizer_hash: str | None
) -> CheckedItem | None:
    """Compare a checkpoint with its checksums, its run and its model; None if it has vanished."""
    item = f"checkpoints/{folder.name}"
    try:
        verify_checkpoint(folder)
        state = read_state(folder)
        problem = _contradiction(state, step, tokenizer_hash)
        if problem is None and config is not None:
            check_loads(folder, config.model)
    except DamagedCheckpointError as error:
        problem = error.problem
    except (CheckpointError, OSError) as error:
        problem = in_run(run, error)
    if not folder.exists():  # a running training dropped it meanwhile
        return None
    if problem is not None:
        return CheckedItem(item, "damaged", problem)
    fits = "fits the model" if config is not None else "not compared with a model"
    return CheckedItem(item, "ok", f"undamaged, {fits}, {size_on_disk(folder):,} bytes")


def _check_snapshots(run: RunFolder, folder: Path) -> list[CheckedItem]:
    """The damaged snapshots of a checkpoint, which is usable without them."""
    try:
        problems = problems_of_snapshots(folder, read_state(folder))
    except (CheckpointError, OSError):  # it was dropped meanwhile
        return []
    if not folder.exists():
        return []
    return [
        CheckedItem(
            snapshot_path(folder, step).relative_to(run.path).as_posix(),
            "damaged",
            f"{problem}; a resumed run cannot go back to it",
        )
        for step, problem in problems.items()
    ]


def _contradiction(state: dict[str, Any], step: int, tokenizer_hash: str | None) -> str | None:
    """A contradiction in a checkpoint's state; None if there is none."""
    try:
        found = state["progress"]["step"]
        recorded = state["identity"].get("tokenizer_hash")
    except (LookupError, TypeError, AttributeError):
        return "its state.json does not name its step and run"
    if found != step:
        return f"it holds step {found}, not {step}"
    if None not in (recorded, tokenizer_hash) and recorded != tokenizer_hash:
        return f"it was made with another tokenizer (hash {str(recorded)[:12]})"
    return None


def _check_links(
    run: RunFolder, steps: Iterable[int], damaged: Collection[int], findings: list[CheckedItem]
) -> None:
    by_name = {f"step_{step:08d}": step for step in steps}
    for name in ("last", "best"):
        link = run.checkpoints / name
        if not link.is_symlink():
            if name == "last" and by_name:
                findings.append(CheckedItem(f"checkpoints/{name}", "note", "the link is missing"))
            continue
        target = os.readlink(link)
        step = by_name.get(target)
        status: Status
        if step is None and link.exists():
            status, detail = "ok", f"leads to {target}, written meanwhile"
        elif step is None:
            status, detail = "damaged", f"leads to {target}, which is not there"
        elif step in damaged:
            status, detail = "damaged", f"leads to {target}, which is damaged"
        elif name == "last" and step < max(by_name.values()):
            status, detail = "note", f"leads to {target}, which is not the newest"
        else:
            status, detail = "ok", f"leads to {target}"
        findings.append(CheckedItem(f"checkpoints/{name}", status, detail))


def _note_leftovers(run: RunFolder, findings: list[CheckedItem]) -> None:
    places = (run.path, run.tokenizer, run.checkpoints)
    for path in sorted(p for place in places if place.is_dir() for p in place.iterdir()):
        if _UNFINISHED.match(path.name):
            size = size_on_disk(path) if path.is_dir() else path.lstat().st_size
            findings.append(
                CheckedItem(
                    path.relative_to(run.path).as_posix(),
                    "note",
                    f"left by a process that was killed ({size:,} bytes); "
                    f"the next resume cleans it up",
                )
            )
