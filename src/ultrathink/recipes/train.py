"""Building a model, and a trainer for a new run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ultrathink.config.monitoring import SINKS
from ultrathink.config.objective import OBJECTIVES
from ultrathink.config.schema import DEFAULT, Config, flatten
from ultrathink.config.size import sizes
from ultrathink.core.divisors import largest_divisor
from ultrathink.core.errors import ConfigError, suggestion
from ultrathink.core.random import seed_everything
from ultrathink.data.documents import Progress
from ultrathink.data.loader import Share, TrainLoader
from ultrathink.data.prepare import PreparedData, prepare_data
from ultrathink.data.tokenizers.base import Tokenizer, behavior_hash, load_tokenizer
from ultrathink.data.validation import ValidationSet
from ultrathink.interop.fetching import is_pretrained
from ultrathink.model.flops import count_parameters, flops_per_token
from ultrathink.model.transformer import Transformer
from ultrathink.monitoring.records import Level
from ultrathink.orchestrator.live import LiveWatch
from ultrathink.parallel.restarts import remember_run
from ultrathink.parallel.watchdog import Watchdog
from ultrathink.parallel.world import check_same, join_world
from ultrathink.recipes.parts.callbacks import SampleWriter, StepBudgetRecorder
from ultrathink.recipes.parts.models import FoundModel, ReadyModels, find_frozen, ready_models
from ultrathink.recipes.parts.pretrained import adopt_pretrained
from ultrathink.recipes.parts.steering import steer
from ultrathink.runs.folder import NAME_IN_USE, RunFolder
from ultrathink.runs.loading import load_weights, weights_from
from ultrathink.runs.lock import RunLock
from ultrathink.runs.manifest import build_manifest, code_and_packages, hardware, write_manifest
from ultrathink.runs.segments import Segment, append_segment
from ultrathink.training.callbacks import Callback, Controller, MetricsCallback
from ultrathink.training.choices import Choices, choose_together
from ultrathink.training.control import LiveSettings
from ultrathink.training.objectives.base import Objective, Parts
from ultrathink.training.offload import HostCopies
from ultrathink.training.optimizers import build_optimizers
from ultrathink.training.run_log import RankLog, RunLog
from ultrathink.training.stepping import Stepper
from ultrathink.training.trainer import Trainer

_SAME_CONFIG = "Start all of them with the same file and the same changes."


def build_model(config: Config) -> Transformer:
    """The bare network of ``config`` on the CPU in fp32, its weights drawn from ``run.seed``."""
    seed_everything(config.run.seed)
    return Transformer(config.model)


def build_trainer(
    config: Config,
    *,
    callbacks: Sequence[Callback] = (),
    controllers: Sequence[Controller] = (),
    progress: Progress | None = None,
) -> Trainer:
    """A trainer for a new run, its folder made; ``trainer.fit()`` trains.

    ``callbacks`` watch, ``controllers`` may steer; ``progress(label, done, total)`` is told how
    far the preparation of data is. Raises ConfigError, DataError or CheckpointError.
    """
    return _begin(config, None, callbacks, controllers, progress)


def begin_again(
    run: RunFolder,
    lock: RunLock | None,
    *,
    callbacks: Sequence[Callback] = (),
    controllers: Sequence[Controller] = (),
    progress: Progress | None = None,
) -> Trainer:
    """A trainer for a run that ended before its first checkpoint: the same run, from step 0."""
    trainer = _begin(run.read_config(), run, callbacks, controllers, progress)
    trainer.lock = lock
    return trainer


def _begin(
    config: Config,
    run: RunFolder | None,
    callbacks: Sequence[Callback],
    controllers: Sequence[Controller],
    progress: Progress | None,
) -> Trainer:
    """A trainer at step 0, in ``run`` or in a folder made for it."""
    world = join_world()
    check_same(world, "configuration", flatten(config.model_dump(mode="json")), _SAME_CONFIG)
    config, beginning = world.main_first(lambda: _beginning(config))
    frozen = world.main_first(lambda: find_frozen(config))
    tokenizers = [beginning.tokenizer, *(found.tokenizer for found in frozen), config.tokenizer]
    tokenizer = next(each for each in tokenizers if each is not None)
    data = world.main_first(lambda: prepare_data(config.data, tokenizer, progress=progress))
    check_vocabulary(config, data)
    for found in frozen:
        found.check(config, data.tokenizer)
    beside = [found.config for found in frozen]
    config, choices = choose_together(config, data.num_samples, world, beside)
    model = build_model(config)
    if beginning.fill is not None:
        beginning.fill(model)
    run, config, lock = _found(run, config, data, model, choices)
    trainer = assemble(config, run, data, model, choices, callbacks, controllers, frozen)
    trainer.lock = lock
    return trainer


def _found(
    run: RunFolder | None, config: Config, data: PreparedData, model: Transformer, choices: Choices
) -> tuple[RunFolder, Config, RunLock | None]:
    """Make the run folder, or write a given one anew; the first process does, for all of them."""
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
                build_manifest(
                    data_hash=data.data_hash,
                    tokenizer_hash=data.tokenizer.fingerprint,
                    num_parameters=count_parameters(model).total,
                ),
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


@dataclass(frozen=True)
class Beginning:
    """Where training starts from: weights to fill a model with, and the tokenizer they go with."""

    fill: Callable[[Transformer], None] | None = None
    tokenizer: Tokenizer | None = None


def _beginning(config: Config) -> tuple[Config, Beginning]:
    """What ``training.init_from`` names, and the configuration that goes with it."""
    source = config.training.init_from
    if source is None:
        return config, Beginning()
    if is_pretrained(source):
        config, pretrained = adopt_pretrained(config)
        return config, Beginning(pretrained.load_into, pretrained.tokenizer)
    weights, parent = weights_from(source, config.run.dir)
    tokenizer = load_tokenizer(parent.tokenizer) if parent is not None else None

    def fill(model: Transformer) -> None:
        load_weights(model, weights)
        if model.routing is not None:
            model.routing.reset()  # how tokens find experts is this configuration's to say

    return _without_warmup(config), Beginning(fill, tokenizer)


def _without_warmup(config: Config) -> Config:
    """``config`` with no warm-up of routing, which is learned already, unless one is asked for."""
    key = "model.moe.routing.warmup_steps"
    if config.model.moe is None or config.origin(key) != DEFAULT:
        return config
    return config.replace({key: 0}, origin="derived from training.init_from: routing is learned")


def environment(choices: Choices) -> dict[str, Any]:
    """What bits depend on beside the run folder, as each segment of a run records it."""
    return {
        **code_and_packages(),
        "hardware": hardware(),
        "device": str(choices.device),
        "precision": choices.precision,
        "processes": choices.world.size,
    }


def check_vocabulary(config: Config, data: PreparedData) -> None:
    """ConfigError where the vocabulary of the data does not fit the model's."""
    size = config.model.vocab_size
    assert size is not None, "a loaded configuration has a vocabulary"
    if data.tokenizer.vocab_size > size:
        raise ConfigError(
            f"model.vocab_size ({size}) is smaller than the tokenizer's vocabulary "
            f"({data.tokenizer.vocab_size}); set tokenizer.vocab_size or model.vocab_size to match."
        )


def assemble(
    config: Config,
    run: RunFolder,
    data: PreparedData,
    model: Transformer,
    choices: Choices,
    callbacks: Sequence[Callback],
    controllers: Sequence[Controller],
    frozen: Sequence[FoundModel] = (),
) -> Trainer:
    """The parts of a run, made for this machine and wired; nothing is loaded or trained yet."""
    training = config.training
    assert isinstance(training.micro_batch_size, int), "choose() has set it"
    tokens_per_step = training.batch_size * config.data.seq_len
    world = choices.world
    share = training.batch_size // world.size

    def tell(text: str, level: Level) -> None:
        trainer.notify("on_message", text, level)

    log = RunLog(run, tell)
    metrics = MetricsCallback(
        [SINKS.load(name)() for name in config.monitoring.sinks if world.is_main],
        log_every=training.log_every,
        flops_per_token=flops_per_token(config.model, config.data.seq_len),
        peak_flops=choices.peak_flops * world.size,
        tell=tell,
    )
    watches = config.orchestrator.mode != "off" and world.is_main
    samples = SampleWriter(config, model, data.tokenizer, metrics.sinks, world)
    ready = ready_models(config, model, frozen, choices)
    objective = _objective(config, data, ready, choices)
    watch = None
    if watches:
        watch = LiveWatch(run, tell, metrics.sinks.phase, without=objective.without_detectors)
    trainer = Trainer(
        objective=objective,
        loader=TrainLoader(
            data.train_stores,
            data.train_weights,
            seq_len=config.data.seq_len,
            batch_size=training.batch_size,
            packing=config.data.packing,
            seed=config.run.seed,
            num_workers=config.data.num_workers,
            share=Share(world.rank, world.size),
        ),
        stepper=_stepper(config, objective, choices),
        training=training,
        run=run,
        settings=LiveSettings(
            clip=training.clip,
            micro_batch_size=largest_divisor(share, training.micro_batch_size),
            eval_every=training.eval.every_steps,
            activation_checkpointing=training.activation_checkpointing,
        ),
        device=choices.device,
        callbacks=[
            StepBudgetRecorder(run, config),
            log,
            *callbacks,
            samples,
            metrics,
            *([watch] if watch is not None else []),
        ]
        if world.is_main
        else [RankLog(run, world.rank), samples],
        controllers=controllers if world.is_main else (),
        world=world,
        watchdog=Watchdog(60 * config.parallel.hang_minutes, run.logs / f"stacks-{world.rank}.txt")
        if world.size > 1
        else None,
        tokens_per_step=tokens_per_step,
        config=config.model_dump(mode="json"),
        heading=_heading(config, choices),
    )
    if config.orchestrator.mode == "act":
        steer(trainer, config.orchestrator, watch, log, metrics.sinks)
    remember_run(run.path, world)
    trainer.identity = {**_identity(data, trainer.loader), "frozen_hash": ready.frozen_hash}
    warnings = [*choices.warnings, *_skipped(data), *data.notes]
    trainer.remarks = [(text, "warning") for text in warnings]
    return trainer


def _identity(data: PreparedData, loader: TrainLoader) -> dict[str, Any]:
    """What a checkpoint may only be gone on with if it is the same: hashes of the data."""
    return {
        "data_hash": data.data_hash,
        "tokenizer_hash": data.tokenizer.fingerprint,
        "tokenizer_behavior": behavior_hash(data.tokenizer),
        "order_hash": loader.order_hash(),
    }


def _objective(
    config: Config, data: PreparedData, ready: ReadyModels, choices: Choices
) -> Objective:
    """What the run learns."""
    training, packing = config.training, config.data.packing
    parts = Parts(
        ready.models,
        device=choices.device,
        isolate_documents=packing.enabled and packing.isolate_documents,
        compilation=ready.compilation,
        world=choices.world,
        held_out=ValidationSet(data.val_stores, config.data.seq_len) if data.val_stores else None,
        scored_tokens=training.eval.max_tokens,
    )
    objective: Objective = OBJECTIVES.load(training.objective.type)(training.objective, parts)
    if training.checkpoint.best_by not in objective.best_by:
        raise ConfigError(
            f"training.checkpoint.best_by = {training.checkpoint.best_by!r}: objective "
            f"{training.objective.type!r} has no such figure. "
            f"{suggestion(training.checkpoint.best_by, objective.best_by)}"
        )
    return objective


def _stepper(config: Config, objective: Objective, choices: Choices) -> Stepper:
    """What takes steps towards ``objective``."""
    optimizers = build_optimizers(config.training.optimizer, objective.model)
    offloads = config.parallel.offload == "optimizer"
    host = HostCopies(optimizers, objective.model) if offloads else None
    return Stepper(objective, optimizers, world=choices.world, host=host)


def _skipped(data: PreparedData) -> list[str]:
    return [
        f"data source {name}: {count} items could not be read and were skipped"
        for name, count in data.skipped.items()
        if count
    ]


def _heading(config: Config, choices: Choices) -> str:
    counts = sizes(config.model)
    active = f" ({counts.active / 1e6:.1f}M active)" if config.model.moe is not None else ""
    compiled = "compiled" if config.training.compile else "eager"
    sources = ", ".join(source.name or source.type for source in config.data.train)
    return (
        f"{counts.total / 1e6:.1f}M parameters{active} on {sources}; {choices.precision}, "
        f"{compiled}, {choices.device}, {torch.get_num_threads()} threads{_spread(config, choices)}"
    )


def _spread(config: Config, choices: Choices) -> str:
    """How the run is spread over processes, in words; nothing for one."""
    replicate, shard = choices.degrees
    if choices.world.size == 1:
        return ""
    if shard == 1:
        return f", {replicate} processes with a copy each"
    copies = f", {replicate} copies" if replicate > 1 else ""
    return f"{copies}, {shard} processes by ZeRO-{config.parallel.zero_stage}"
