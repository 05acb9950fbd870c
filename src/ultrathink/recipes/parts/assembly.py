"""Builds the parts of a run for this machine, and connects them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from ultrathink.config.monitoring import SINKS
from ultrathink.config.objective import OBJECTIVES
from ultrathink.config.schema import Config
from ultrathink.config.size import sizes
from ultrathink.config.training import TrainingConfig
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
from ultrathink.parallel.mesh import ParallelDims
from ultrathink.parallel.restarts import remember_run
from ultrathink.parallel.watchdog import Watchdog
from ultrathink.recipes.parts.callbacks import SampleWriter, StepBudgetRecorder
from ultrathink.recipes.parts.initial_weights import check_best_by
from ultrathink.recipes.parts.models import FoundModel, ready_models
from ultrathink.recipes.parts.steering import steer
from ultrathink.runs.folder import RunFolder
from ultrathink.training.callbacks import Callback, Controller, MetricsCallback
from ultrathink.training.choices import Choices
from ultrathink.training.compiling import Compilation
from ultrathink.training.evaluators.base import NO_EVALUATORS, EvaluatorSet
from ultrathink.training.model_set import ModelSet
from ultrathink.training.objectives.base import Objective, Parts
from ultrathink.training.offload import HostCopies
from ultrathink.training.optimizers import build_optimizers
from ultrathink.training.run_log import RankLog, RunLog
from ultrathink.training.settings import LiveSettings
from ultrathink.training.stepping import Stepper
from ultrathink.training.trainer import Trainer


def build_model(config: Config) -> Transformer:
    """The network of ``config`` on the CPU in fp32, with weights initialized from ``run.seed``."""
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
    frozen: Sequence[FoundModel] = (),
    evaluators: EvaluatorSet = NO_EVALUATORS,
) -> Trainer:
    """The connected parts of a run for this machine; nothing is loaded or trained yet."""
    training = config.training
    world, dims = choices.world, choices.dims

    def report(text: str, level: Level) -> None:
        trainer.notify("on_message", text, level)

    logging.getLogger("ultrathink").setLevel(config.monitoring.log_level.upper())
    log = RunLog(run, report)
    metrics = MetricsCallback(
        [SINKS.load(name)() for name in config.monitoring.sinks if world.is_main],
        log_every=training.log_every,
        flops_per_token=flops_per_token(config.model, config.data.seq_len),
        peak_flops=choices.peak_flops * world.size,
        report=report,
    )
    watches = config.orchestrator.mode != "off" and world.is_main
    samples = SampleWriter(config, model, data.tokenizer, metrics.sinks, world)
    # Before models are made ready: from then on freed memory is kept.
    loader = TrainLoader(
        data.train_stores,
        data.record.weights,
        seq_len=config.data.seq_len,
        batch_size=training.batch_size,
        packing=config.data.packing,
        seed=config.run.seed,
        num_workers=config.data.num_workers,
        share=Share(dims.dp_group.rank, dims.dp_group.size),
    )
    objective = _objective(config, data, ready_models(config, model, frozen, choices), choices)
    without = objective.without_detectors
    watch = LiveWatch(run, report, metrics.sinks.phase, without=without) if watches else None
    trainer = Trainer(
        objective=objective,
        loader=loader,
        stepper=_stepper(config, objective, choices),
        training=training,
        run=run,
        settings=_settings(training, dims),
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
        evaluators=evaluators,
        world=world,
        dims=dims,
        watchdog=Watchdog(60 * config.parallel.hang_minutes, run.logs / f"stacks-{world.rank}.txt")
        if world.size > 1
        else None,
        tokens_per_step=training.batch_size * config.data.seq_len,
        config=config.model_dump(mode="json"),
        heading=_heading(config, choices),
    )
    if config.orchestrator.mode == "act":
        steer(trainer, config.orchestrator, watch, log, metrics.sinks, report)
    remember_run(run.path, world)
    trainer.identity = _identity(data, trainer.loader, objective.models)
    warnings = [*choices.warnings, *_rounded(config), *_skipped(data), *data.notes]
    trainer.remarks = [(text, "warning") for text in warnings]
    return trainer


def _settings(training: TrainingConfig, dims: ParallelDims) -> LiveSettings:
    assert isinstance(training.micro_batch_size, int), "choose() has set it"
    return LiveSettings(
        clip=training.clip,
        micro_batch_size=largest_divisor(
            dims.share(training.batch_size), training.micro_batch_size
        ),
        eval_every=training.eval.every_steps,
        activation_checkpointing=training.activation_checkpointing,
    )


def _identity(data: PreparedData, loader: TrainLoader, models: ModelSet) -> dict[str, Any]:
    """Hashes of the data and of frozen models, which must not change when a run is resumed."""
    return {
        "frozen_hash": models.frozen_hash,
        "data_hash": data.record.data_hash,
        "tokenizer_hash": data.tokenizer.fingerprint,
        "tokenizer_behavior": behavior_hash(data.tokenizer),
        "order_hash": loader.order_hash(),
    }


def _objective(
    config: Config, data: PreparedData, ready: tuple[ModelSet, Compilation], choices: Choices
) -> Objective:
    """The objective of the run."""
    training, packing = config.training, config.data.packing
    check_best_by(training)
    models, compilation = ready
    parts = Parts(
        models,
        device=choices.device,
        isolate_documents=packing.enabled and packing.isolate_documents,
        compilation=compilation,
        seed=config.run.seed,
        dp_group=choices.dims.dp_group,
        held_out=ValidationSet(data.val_stores, config.data.seq_len) if data.val_stores else None,
        scored_tokens=training.eval.max_tokens,
        scored_paths=training.eval.paths,
        source_groups=tuple(source.groups for source in config.data.train),
    )
    objective: Objective = OBJECTIVES.load(training.objective.type)(training.objective, parts)
    return objective


def _stepper(config: Config, objective: Objective, choices: Choices) -> Stepper:
    """The stepper for ``objective``."""
    models = objective.models
    optimizers = [
        optimizer
        for one in models.trained.values()
        for optimizer in build_optimizers(
            config.training.optimizer,
            one.module,
            lr_factor=one.lr_factor,
            weight_decay=one.weight_decay,
        )
    ]
    offloads = config.parallel.offload == "optimizer"
    return Stepper(
        objective,
        optimizers,
        world=choices.world,
        dp_group=choices.dims.dp_group,
        host=HostCopies(optimizers, models.named_parameters()) if offloads else None,
    )


def _heading(config: Config, choices: Choices) -> str:
    """Size, data, precision and devices of a run, in one line."""
    counts = sizes(config.model)
    active = f" ({counts.active / 1e6:.1f}M active)" if config.model.moe is not None else ""
    compiled = "compiled" if config.training.compile else "eager"
    sources = ", ".join(source.name or source.type for source in config.data.train)
    return (
        f"{counts.total / 1e6:.1f}M parameters{active} on {sources}; {choices.precision}, "
        f"{compiled}, {choices.device}, {torch.get_num_threads()} threads{_spread(config, choices)}"
    )


def _spread(config: Config, choices: Choices) -> str:
    """How the run is distributed over processes, as text; empty for one."""
    replicate, shard = choices.dims.dp_replicate, choices.dims.dp_shard
    if choices.world.size == 1:
        return ""
    if shard == 1:
        return f", {replicate} processes with a replica each"
    copies = f", {replicate} replicas" if replicate > 1 else ""
    return f"{copies}, {shard} processes by ZeRO-{config.parallel.zero_stage}"


def _rounded(config: Config) -> list[str]:
    return config.model.mod.rounded() if config.model.mod is not None else []


def _skipped(data: PreparedData) -> list[str]:
    return [
        f"data source {name}: {count} items could not be read and were skipped"
        for name, count in data.record.skipped.items()
        if count
    ]
