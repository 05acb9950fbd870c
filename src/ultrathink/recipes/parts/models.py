"""Finds and checks the frozen models of a run, and prepares all modules for this machine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ultrathink.checkpoint.format import read_state
from ultrathink.config.model import ModelConfig
from ultrathink.config.objective import OBJECTIVES, FrozenSource
from ultrathink.config.schema import Config
from ultrathink.core.errors import CheckpointError, ConfigError
from ultrathink.core.random import random_state, seed_everything, set_random_state, step_seed
from ultrathink.data.tokenizers.base import Tokenizer, load_tokenizer
from ultrathink.interop.fetching import is_pretrained
from ultrathink.interop.importing import open_pretrained
from ultrathink.model.transformer import Transformer, transformers_in
from ultrathink.parallel.sharding import shard_module
from ultrathink.parallel.timing import CommunicationClock
from ultrathink.runs.loading import empty_model, load_weights, weights_from
from ultrathink.training.choices import Choices
from ultrathink.training.compiling import Compilation
from ultrathink.training.hardware import DTYPES, keep_freed_memory
from ultrathink.training.model_set import MAIN, FrozenModel, ModelSet, TrainedModule
from ultrathink.training.objectives.base import Objective

_NO_STEP = 2**32  # in place of a step, for a seed that no step uses


@dataclass(frozen=True)
class FoundModel:
    """A frozen model; ``fill`` reads its weights."""

    name: str
    source: FrozenSource
    config: ModelConfig
    tokenizer: Tokenizer | None  # None if there are only weights
    fill: Callable[[Transformer], None]

    def checked(self, config: Config, tokenizer: Tokenizer) -> ModelConfig:
        """Its configuration; ConfigError if its token ids are not those of the run."""
        place, ours = f"{self.source.field}={self.source.source}", config.model.vocab_size
        theirs = self.config.vocab_size
        if theirs != ours:
            raise ConfigError(
                f"{place} has a vocabulary of {theirs} tokens, but the model one of {ours}; set "
                f"model.vocab_size={theirs}, or name a {self.name} with the model's vocabulary."
            )
        if self.tokenizer is not None and self.tokenizer.fingerprint != tokenizer.fingerprint:
            raise ConfigError(
                f"{place} has another tokenizer than this run, so its token ids mean other text; "
                f"name a {self.name} that was trained with the run's tokenizer."
            )
        return self.config


def find_frozen(config: Config) -> tuple[FoundModel, ...]:
    """The frozen models of the objective; CheckpointError if one is missing or damaged."""
    wanted = config.training.objective.frozen_models()
    return tuple(_find(name, source, config) for name, source in wanted.items())


def _find(name: str, source: FrozenSource, config: Config) -> FoundModel:
    text = source.source
    try:
        if is_pretrained(text):
            pretrained = open_pretrained(text)
            pretrained.check_length(config.data.seq_len)
            model, fill = pretrained.model, pretrained.load_into
            return FoundModel(name, source, model, pretrained.tokenizer, fill)
        weights, run = weights_from(text, config.run.dir)
        if run is not None:
            model, tokenizer = run.read_config().model, load_tokenizer(run.tokenizer)
        else:
            plain: dict[str, Any] = read_state(weights)["config"]
            model, tokenizer = ModelConfig.model_validate(plain["model"]), None
    except CheckpointError as error:
        raise CheckpointError(
            f"the {name} of this run cannot be read ({str(error).rstrip('.')}); put it back, or "
            f"name its new place: {source.field}=PLACE."
        ) from error
    return FoundModel(name, source, model, tokenizer, lambda empty: load_weights(empty, weights))


def models_beside(config: Config) -> list[ModelConfig]:
    """The configurations of the Transformers that the objective trains beside the main one."""
    with torch.device("meta"):
        found = _further(config, Transformer(config.model))
    return [model.config for one in found.values() for model in transformers_in(one.module)]


def _further(config: Config, model: Transformer) -> dict[str, TrainedModule]:
    """The modules that the objective trains beside ``model``; its random state is unchanged."""
    objective: type[Objective] = OBJECTIVES.load(config.training.objective.type)
    before = random_state()
    seed_everything(step_seed(config.run.seed, _NO_STEP, 0))
    try:
        return objective.modules(config.training.objective, model)
    finally:
        set_random_state(before)


def ready_models(
    config: Config, model: Transformer, frozen: Sequence[FoundModel], choices: Choices
) -> tuple[ModelSet, Compilation]:
    """``model``, the other trained modules, and the ``frozen`` ones, on their device, compiled and
    sharded as configured."""
    trained = {MAIN: TrainedModule(model), **_further(config, model)}
    if choices.device.type == "cpu":
        keep_freed_memory()  # not earlier: memory freed after building would stay fragmented
    several = choices.world.size > 1
    compilation = Compilation(bool(config.training.compile), by_blocks=several)
    mesh = choices.dims.dp_mesh(choices.device.type) if several else None
    clock = CommunicationClock()
    for name, one in trained.items():
        _make_trainable(one, config, choices, compilation)
        if mesh is not None:
            accumulation = shard_module(one.module, mesh, config.parallel, clock)
            trained[name] = replace(one, accumulation=accumulation)
    digest = hashlib.sha256()
    asked: dict[str, FrozenModel] = {}
    for found in frozen:
        other = empty_model(found.config)
        found.fill(other)
        for name, value in other.state_dict().items():
            digest.update(f"{found.name}/{name}".encode() + value.numpy().tobytes())
        dtype = DTYPES[_precision(found.source.precision, choices)]
        asked[found.name] = FrozenModel(other.to(choices.device, dtype), compilation)
        _prepare(other, config, compilation)
        if mesh is not None:
            shard_module(other, mesh, config.parallel, clock)
    frozen_hash = digest.hexdigest() if frozen else None
    return ModelSet(trained, asked, frozen_hash, compilation.is_on), compilation


def _make_trainable(
    one: TrainedModule, config: Config, choices: Choices, compilation: Compilation
) -> None:
    precision = _precision(one.precision, choices)
    one.module.to(choices.device)
    if precision == "fp64":
        one.module.double()
    for model in transformers_in(one.module):
        model.compute_dtype = DTYPES[precision]
        model.set_activation_checkpointing(config.training.activation_checkpointing)
        _prepare(model, config, compilation)


def _precision(own: str, choices: Choices) -> str:
    return choices.precision if own == "auto" else own


def _prepare(model: Transformer, config: Config, compilation: Compilation) -> None:
    model.rope.reserve(config.data.seq_len)  # a compiled step cannot grow the tables
    model.set_attention_backend(config.model.attention.backend)
    compilation.of_model(model)
