"""The parts of a run, made for this machine and put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ultrathink.config.monitoring import SINKS
from ultrathink.config.schema import Config
from ultrathink.core.divisors import largest_divisor
from ultrathink.core.random import seed_everything
from ultrathink.data.loader import Share, TrainLoader
from ultrathink.data.prepare import PreparedData
from ultrathink.data.tokenizers.base import behavior_hash
from ultrathink.data.validation import ValidationSet
from ultrathink.model.flops import flops_per_token
from ultrathink.model.transformer import Transformer
from ultrathink.monitoring.records import Level
from ultrathink.orchestrator.live import LiveWatch
from ultrathink.parallel.mesh import build_mesh
from ultrathink.parallel.restarts import remember_run
from ultrathink.parallel.sharding import shard_model
from ultrathink.parallel.watchdog import Watchdog
from ultrathink.recipes.parts.callbacks import SampleWriter, StepBudgetRecorder
from ultrathink.recipes.parts.heading import heading
from ultrathink.recipes.parts.steering import steer
from ultrathink.runs.folder import RunFolder
from ultrathink.training.callbacks import Callback, Controller, MetricsCallback
from ultrathink.training.choices import Choices
from ultrathink.training.compiling import compile_blocks, compile_function
from ultrathink.training.control import LiveSettings
from ultrathink.training.hardware import DTYPES, keep_freed_memory
from ultrathink.training.offload import HostCopies
from ultrathink.training.optimizers import build_optimizers
from ultrathink.training.run_log import RankLog, RunLog
from ultrathink.training.stepping import Stepper, loss_function
from ultrathink.training.trainer import Trainer


def build_model(config: Config) -> Transformer:
    """The bare network of ``config`` on the CPU in fp32, its weights drawn from ``run.seed``."""
    seed_everything(config.run.seed)
    return Transformer(config.model)


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
            share=Share(world.rank, world.size),
        ),
        held_out=ValidationSet(data.val_stores, config.data.seq_len) if data.val_stores else None,
        stepper=_stepper(config, model, choices),
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
        heading=heading(config, choices),
    )
    if config.orchestrator.mode == "act":
        steer(trainer, config.orchestrator, watch, log, metrics.sinks)
    remember_run(run.path, world)
    trainer.identity = _identity(data, trainer.loader)
    warnings = [*choices.warnings, *_skipped(data), *data.notes]
    trainer.remarks = [(text, "warning") for text in warnings]
    return trainer


def _identity(data: PreparedData, loader: TrainLoader) -> dict[str, Any]:
    """Hashes that have to be the same for a checkpoint to be resumed."""
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
        mesh = build_mesh(choices.degrees, choices.device.type)
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
        accumulation=accumulation,
        host=HostCopies(optimizers, model) if offloads else None,
    )


def _skipped(data: PreparedData) -> list[str]:
    return [
        f"data source {name}: {count} items could not be read and were skipped"
        for name, count in data.skipped.items()
        if count
    ]
