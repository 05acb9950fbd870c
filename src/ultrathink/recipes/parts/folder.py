"""Creates the folder of a new run, and writes what is recorded at each start."""

from __future__ import annotations

from pathlib import Path

from ultrathink.config.schema import Config
from ultrathink.data.prepare import PreparedData
from ultrathink.model.flops import count_parameters
from ultrathink.model.transformer import Transformer
from ultrathink.recipes.parts.environment import environment
from ultrathink.runs.folder import NAME_IN_USE, RunFolder
from ultrathink.runs.lock import RunLock
from ultrathink.runs.manifest import write_manifest
from ultrathink.runs.segments import Segment, append_segment
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
