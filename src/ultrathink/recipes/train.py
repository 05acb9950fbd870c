"""Building a model, and a trainer for a new run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ultrathink.config.monitoring import SINKS
from ultrathink.config.schema import DEFAULT, Config, flatten
from ultrathink.config.size import sizes
from ultrathink.core.divisors import largest_divisor
from ultrathink.core.errors import ConfigError
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
from ultrathink.parallel.sharding import shard_model
from ultrathink.parallel.watchdog import Watchdog
from ultrathink.parallel.world import check_same, join_world
from ultrathink.recipes.parts.callbacks import SampleWriter, StepBudgetRecorder
from ultrathink.recipes.parts.pretrained import adopt_pretrained
from ultrathink.recipes.parts.steering import steer
from ultrathink.runs.folder import NAME_IN_USE, RunFolder
from ultrathink.runs.loading import load_weights, weights_from
from ultrathink.runs.lock import RunLock
from ultrathink.runs.manifest import build_manifest, code_and_packages, hardware, write_manifest
from ultrathink.runs.segments import Segment, append_segment
from ultrathink.training.callbacks import Callback, Controller, MetricsCallback
from ultrathink.training.choices import Choices, choose_together
from ultrathink.training.compiling import compile_blocks, compile_function
from ultrathink.training.control import LiveSettings
from ultrathink.training.hardware import DTYPES, keep_freed_memory
from ultrathink.training.offload import HostCopies
from ultrathink.training.optimizers import build_optimizers
from ultrathink.training.run_log import RankLog, RunLog
from ultrathink.training.stepping import Stepper, loss_function
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
    data = world.main_first(
        lambda: prepare_data(
            config.data, beginning.tokenizer or config.tokenizer, progress=progress
        )
    )
    check_vocabulary(config, data)
    config, choices = choose_together(config, data.num_samples, world)
    model = build_model(config)
    if beginning.fill is not None:
        beginning.fill(model)
    run, config, lock = _found(run, config, data, model, choices)
    trainer = assemble(config, run, data, model, choices, callbacks, controllers)
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
                    "train",
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
) -> Trainer:
    """The parts of a run, made for this machine and wired; nothing is loaded or trained yet."""
    training = config.training
    assert isinstance(training.micro_batch_size, int), "choose() has set it"
    tokens_per_step = training.batch_size * config.data.seq_len
    world, dims = choices.world, choices.dims

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
    watch = LiveWatch(run, tell, metrics.sinks.phase) if watches else None
    samples = SampleWriter(config, model, data.tokenizer, metrics.sinks, world)
    trainer = Trainer(
        model=model,
        loader=TrainLoader(
            data.train_stores,
            data.train_weights,
            seq_len=config.data.seq_len,
            batch_size=training.batch_size,
            packing=config.data.packing,
            seed=config.run.seed,
            num_workers=config.data.num_workers,
            share=Share(dims.dp_group.rank, dims.dp_group.size),
        ),
        held_out=ValidationSet(data.val_stores, config.data.seq_len) if data.val_stores else None,
        stepper=_stepper(config, model, choices),
        training=training,
        run=run,
        settings=LiveSettings(
            clip=training.clip,
            micro_batch_size=largest_divisor(
                dims.share(training.batch_size), training.micro_batch_size
            ),
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
        dims=dims,
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
    trainer.identity = _identity(data, trainer.loader)
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


def _stepper(config: Config, model: Transformer, choices: Choices) -> Stepper:
    """The model made ready for this machine, and what takes steps with it."""
    training, packing = config.training, config.data.packing
    if choices.device.type == "cpu":
        keep_freed_memory()  # not before: what building leaves free would stay taken, in pieces
    model.to(choices.device)
    if choices.precision == "fp64":
        model.double()
    model.compute_dtype = DTYPES[choices.precision]
    model.rope.reserve(config.data.seq_len)  # a compiled step cannot grow the tables
    model.set_activation_checkpointing(training.activation_checkpointing)
    model.set_attention_backend(config.model.attention.backend)
    accumulation = None
    if choices.world.size > 1:
        if training.compile:
            compile_blocks(model)
        mesh = choices.dims.dp_mesh(choices.device.type)
        accumulation = shard_model(model, mesh, config.parallel)
    losses = loss_function(model)
    if training.compile and choices.world.size == 1:
        losses = compile_function(losses)
    optimizers = build_optimizers(training.optimizer, model)
    offloads = config.parallel.offload == "optimizer"
    return Stepper(
        model,
        optimizers,
        losses,
        device=choices.device,
        isolate_documents=packing.enabled and packing.isolate_documents,
        world=choices.world,
        dp_group=choices.dims.dp_group,
        accumulation=accumulation,
        host=HostCopies(optimizers, model) if offloads else None,
    )


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
    replicate, shard = choices.dims.dp_replicate, choices.dims.dp_shard
    if choices.world.size == 1:
        return ""
    if shard == 1:
        return f", {replicate} processes with a copy each"
    copies = f", {replicate} copies" if replicate > 1 else ""
    return f"{copies}, {shard} processes by ZeRO-{config.parallel.zero_stage}"
