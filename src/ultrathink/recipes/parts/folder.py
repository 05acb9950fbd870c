"""Creates the folder of a new run, and writes what is recorded at each start."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ultrathink.config.schema import Config
from ultrathink.data.prepare import PreparedData
from ultrathink.model.flops import count_parameters
from ultrathink.model.transformer import Transformer
from ultrathink.runs.folder import NAME_IN_USE, RunFolder
from ultrathink.runs.lock import RunLock
from ultrathink.runs.manifest import code_and_packages, hardware, write_manifest
from ultrathink.runs.segments import Segment, append_segment, read_segments
from ultrathink.training.choices import Choices


def start_folder(
    run: RunFolder | None, config: Config, data: PreparedData, model: Transformer, choices: Choices
) -> tuple[RunFolder, Config, RunLock | None]:
    """Create the run folder, or rewrite a given one, on the first process."""
    world, lock = choices.world, None
    error: Exception | None = None
    if world.is_main:
        try:
            if run is None:
                run, config = RunFolder.create(config)
                lock = RunLock.acquire(run)
            run.write_config(config)
            data.tokenizer.save(run.tokenizer)
            write_manifest(
                run.manifest,
                data_hash=data.record.data_hash,
                tokenizer_hash=data.tokenizer.fingerprint,
                num_parameters=count_parameters(model).total,
            )
            data.record.write(run.data_record)
            append_segment(run.segments, Segment(from_step=0, environment=environment(choices)))
        except Exception as caught:
            error = caught
    world.raise_together(error)
    path, name = world.from_main([str(run.path.absolute()), config.run.name] if run else None)
    if run is None:
        run, config = RunFolder(Path(path)), config.replace({"run.name": name}, origin=NAME_IN_USE)
    return run, config, lock


# What bits depend on, as reported, by its place in the environment.
_BITS_DEPEND_ON = {
    "torch": ("packages", "torch"),
    "processor": ("hardware", "cpu"),
    "threads": ("hardware", "threads"),
    "device": ("device",),
    "processes": ("processes",),
}


def environment(choices: Choices) -> dict[str, Any]:
    """What bits depend on apart from the run folder, as recorded in each segment of a run."""
    return {
        **code_and_packages(),
        "hardware": hardware(),
        "device": str(choices.device),
        "precision": choices.precision,
        "processes": choices.world.size,
    }


def environment_changes(run: RunFolder, here: dict[str, Any]) -> list[str]:
    """A sentence if the environment changed, so that bits will differ."""
    segments = read_segments(run.segments)
    differing = []
    for name, keys in _BITS_DEPEND_ON.items() if segments else ():
        then, now = (_inside(place, keys) for place in (segments[-1].environment, here))
        if then != now:
            differing.append(f"{name} {then} -> {now}")
    if not differing:
        return []
    return [f"the run resumes, but not bit for bit as without the stop: {'; '.join(differing)}"]


def _inside(tree: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree
