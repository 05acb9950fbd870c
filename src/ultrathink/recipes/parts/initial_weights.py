"""The initial weights of a new run: random, those of another run, or those of Hugging Face."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ultrathink.config.objective import OBJECTIVES
from ultrathink.config.root import DEFAULT
from ultrathink.config.schema import Config
from ultrathink.config.training import TrainingConfig
from ultrathink.core.errors import ConfigError, suggestion
from ultrathink.data.prepare import PreparedData
from ultrathink.data.prompts import opening_words
from ultrathink.data.tokenizers.base import Tokenizer, load_tokenizer
from ultrathink.interop.fetching import is_pretrained
from ultrathink.model.transformer import Transformer
from ultrathink.recipes.parts.pretrained import adopt_pretrained
from ultrathink.runs.conversion import conversion, load_fitted
from ultrathink.runs.loading import model_config_of, weights_from
from ultrathink.training.objectives.base import Objective


@dataclass(frozen=True)
class InitialWeights:
    """The weights to load into a model, and their tokenizer; None for random weights."""

    fill: Callable[[Transformer], None] | None = None
    tokenizer: Tokenizer | None = None


def find_initial_weights(config: Config) -> tuple[Config, InitialWeights]:
    """The weights of ``training.init_from``, and the configuration adapted to them."""
    source = config.training.init_from
    if source is None:
        return config, InitialWeights()
    if is_pretrained(source):
        config, pretrained = adopt_pretrained(config)
        return config, InitialWeights(pretrained.load_into, pretrained.tokenizer)
    weights, parent = weights_from(source, config.run.dir)
    tokenizer = load_tokenizer(parent.tokenizer) if parent is not None else None

    def fill(model: Transformer) -> None:
        load_fitted(model, weights)
        if model.routing is not None:
            model.routing.reset()  # live routing controls follow this configuration
        if model.depth is not None:
            model.depth.reset()

    theirs = model_config_of(weights)
    conversion(theirs, config.model)  # what is impossible is refused before data is prepared
    is_routed = theirs is None or theirs.moe is not None
    return _without_warmup(config) if is_routed else config, InitialWeights(fill, tokenizer)


def _without_warmup(config: Config) -> Config:
    """``config`` without warm-up of routing, which is learned already, unless it is configured."""
    key = "model.moe.routing.warmup_steps"
    if config.model.moe is None or config.origin(key) != DEFAULT:
        return config
    return config.replace({key: 0}, origin="derived from training.init_from: routing is learned")


def check_vocabulary(config: Config, tokenizer: Tokenizer) -> None:
    """Raise ConfigError if the vocabulary of the tokenizer is larger than the model's."""
    size = config.model.vocab_size
    assert size is not None, "a loaded configuration has a vocabulary"
    if tokenizer.vocab_size > size:
        raise ConfigError(
            f"model.vocab_size ({size}) is smaller than the tokenizer's vocabulary "
            f"({tokenizer.vocab_size}); set tokenizer.vocab_size or model.vocab_size to match."
        )


def check_best_by(training: TrainingConfig) -> None:
    """ConfigError where the objective has no figure ``training.checkpoint.best_by``."""
    objective: type[Objective] = OBJECTIVES.load(training.objective.type)
    best_by = training.checkpoint.best_by
    if best_by not in objective.best_by:
        raise ConfigError(
            f"training.checkpoint.best_by = {best_by!r}: objective {training.objective.type!r} "
            f"has no such figure. {suggestion(best_by, objective.best_by)}"
        )


def with_prompts(config: Config, data: PreparedData) -> Config:
    """``config`` with prompts of the held-out text where it names none."""
    if config.training.sample.prompts is not None:
        return config
    prompts = opening_words(data.val_stores or data.train_stores, data.tokenizer)
    return config.replace(
        {"training.sample.prompts": prompts}, origin="chosen at run time: words of the text"
    )
