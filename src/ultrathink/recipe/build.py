"""Building a trainer: for a new run, or to go on with one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ultrathink.config.monitoring import SINKS
from ultrathink.config.schema import Config
from ultrathink.core.errors import CheckpointError, ConfigError
from ultrathink.core.random import seed_everything
from ultrathink.data.documents import Progress
from ultrathink.data.loader import TrainLoader
from ultrathink.data.prepare import PreparedData, prepare_data
from ultrathink.data.tokenizers.base import Tokenizer, load_tokenizer
from ultrathink.data.validation import ValidationSet
from ultrathink.model.flops import count_parameters, flops_per_token
from ultrathink.model.transformer import Transformer
from ultrathink.monitoring.records import Sink
from ultrathink.recipe.callbacks import SampleWriter, StepBudgetRecorder
from ultrathink.recipe.choices import Choices, choose
from ultrathink.runs.checkpoint import load_checkpoint
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.loading import load_weights, weights_from
from ultrathink.runs.manifest import build_manifest, write_manifest
from ultrathink.training.callbacks import Callback, Controller, MetricsCallback
from ultrathink.training.compiling import compile_function
from ultrathink.training.control import LiveSettings
from ultrathink.training.hardware import DTYPES
from ultrathink.training.optimizers import build_optimizers
from ultrathink.training.run_log import RunLog
from ultrathink.training.stepping import Stepper, loss_function
from ultrathink.training.trainer import Trainer


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
    weights, parent = None, None
    if config.training.init_from is not None:
        weights, parent = weights_from(config.training.init_from, config.run.dir)
    tokenizer = load_tokenizer(parent.tokenizer) if parent is not None else None
    data = _prepare(config, tokenizer, progress)
    config, choices = choose(config, data.num_samples)
    model = build_model(config)
    if weights is not None:
        load_weights(model, weights)
    run, config = RunFolder.create(config)
    data.tokenizer.save(run.tokenizer)
    write_manifest(
        run.manifest,
        build_manifest(
            data_hash=data.data_hash,
            tokenizer_hash=data.tokenizer.fingerprint,
            num_parameters=count_parameters(model).total,
        ),
    )
    return _assemble(config, run, data, model, choices, callbacks, controllers)


def resume_trainer(
    run: RunFolder,
    checkpoint: str = "last",
    *,
    callbacks: Sequence[Callback] = (),
    controllers: Sequence[Controller] = (),
    progress: Progress | None = None,
) -> Trainer:
    """A trainer that goes on from a checkpoint of ``run``, bit for bit as if never stopped."""
    folder = run.checkpoint(checkpoint)
    config = run.read_config()
    data = _prepare(config, load_tokenizer(run.tokenizer), progress)
    config, choices = choose(config, data.num_samples)
    model = build_model(config)
    trainer = _assemble(config, run, data, model, choices, callbacks, controllers)
    load_weights(model, folder)  # names what differs, where the model is another
    state: dict[str, Any] = dict(load_checkpoint(folder))
    _check_identity(state["identity"], trainer.identity)
    trainer.load_state_dict(state)
    run.remove_after(trainer.progress.step)
    return trainer


def _prepare(
    config: Config, tokenizer: Tokenizer | None, progress: Progress | None
) -> PreparedData:
    """Tokenized data; ConfigError where its vocabulary does not fit the model's."""
    data = prepare_data(config.data, tokenizer or config.tokenizer, progress=progress)
    size = config.model.vocab_size
    assert size is not None, "a loaded configuration has a vocabulary"
    if data.tokenizer.vocab_size > size:
        raise ConfigError(
            f"model.vocab_size ({size}) is smaller than the tokenizer's vocabulary "
            f"({data.tokenizer.vocab_size}); set tokenizer.vocab_size or model.vocab_size to match."
        )
    return data


def _check_identity(recorded: dict[str, Any], here: dict[str, Any]) -> None:
    """Refuse to go on with other data or another tokenizer than the checkpoint was made with."""
    for name, advice in (
        ("tokenizer_hash", "put the run's tokenizer folder back as it was"),
        ("data_hash", "put the files back as they were"),
    ):
        if recorded.get(name) != here[name]:
            what = name.removesuffix("_hash")
            raise CheckpointError(
                f"the {what} changed since the checkpoint was written ({what} hash "
                f"{str(recorded.get(name))[:12]} then, {str(here[name])[:12]} now), so the run "
                f"cannot go on where it stopped; {advice}, or start a new run with its weights: "
                f"training.init_from=RUN."
            )


def _assemble(
    config: Config,
    run: RunFolder,
    data: PreparedData,
    model: Transformer,
    choices: Choices,
    callbacks: Sequence[Callback],
    controllers: Sequence[Controller],
) -> Trainer:
    training = config.training
    model.to(choices.device)
    if choices.precision == "fp64":
        model.double()
    model.compute_dtype = DTYPES[choices.precision]
    model.rope.reserve(config.data.seq_len)  # a compiled step cannot grow the tables
    model.set_activation_checkpointing(training.activation_checkpointing)
    model.set_attention_backend(config.model.attention.backend)
    losses = loss_function(model)
    if training.compile:
        losses = compile_function(losses)
    packing = config.data.packing
    stepper = Stepper(
        model,
        build_optimizers(training.optimizer, model),
        losses,
        device=choices.device,
        isolate_documents=packing.enabled and packing.isolate_documents,
    )
    assert isinstance(training.micro_batch_size, int), "choose() has set it"
    sinks: list[Sink] = [SINKS.load(name)() for name in config.monitoring.sinks]
    tokens_per_step = training.batch_size * config.data.seq_len
    metrics = MetricsCallback(
        sinks,
        log_every=training.log_every,
        flops_per_token=flops_per_token(config.model, config.data.seq_len),
        peak_flops=choices.peak_flops,
    )
    trainer = Trainer(
        model=model,
        loader=TrainLoader(
            data.train_stores,
            data.train_weights,
            seq_len=config.data.seq_len,
            batch_size=training.batch_size,
            packing=packing,
            seed=config.run.seed,
            num_workers=config.data.num_workers,
        ),
        held_out=ValidationSet(data.val_stores, config.data.seq_len) if data.val_stores else None,
        stepper=stepper,
        training=training,
        run=run,
        settings=LiveSettings(clip=training.clip, micro_batch_size=training.micro_batch_size),
        device=choices.device,
        callbacks=[
            StepBudgetRecorder(run, config),
            RunLog(run),
            *callbacks,
            SampleWriter(config, model, data.tokenizer, sinks),
            metrics,
        ],
        controllers=controllers,
        tokens_per_step=tokens_per_step,
        identity={
            "data_hash": data.data_hash,
            "tokenizer_hash": data.tokenizer.fingerprint,
        },
        heading=_heading(config, model, choices),
    )
    trainer.warnings = [*choices.warnings, *_skipped(data)]
    return trainer


def _skipped(data: PreparedData) -> list[str]:
    return [
        f"data source {name}: {count} items could not be read and were skipped"
        for name, count in data.skipped.items()
        if count
    ]


def _heading(config: Config, model: Transformer, choices: Choices) -> str:
    millions = count_parameters(model).total / 1e6
    compiled = "compiled" if config.training.compile else "eager"
    sources = ", ".join(source.name or source.type for source in config.data.train)
    return (
        f"{millions:.1f}M parameters on {sources}; {choices.precision}, {compiled}, "
        f"{choices.device}, {torch.get_num_threads()} threads"
    )
