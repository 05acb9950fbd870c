"""What training would refuse before its first step, found without preparing or training anything.

Torch is imported only where the configuration names weights or a device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from ultrathink.config.evaluators import TextEvaluatorConfig
from ultrathink.config.schema import Config
from ultrathink.config.tokenizer import TOKENIZERS, HuggingFaceTokenizerConfig
from ultrathink.config.training import CheckpointConfig
from ultrathink.core.errors import UltrathinkError
from ultrathink.data.sources.opening import unreadable
from ultrathink.interop.fetching import is_pretrained


def find_problems(config: Config) -> list[str]:
    """A message for each thing that ``ultrathink train`` would refuse; empty where there is none.

    The configuration is one that ``load_config`` accepted, with what its pretrained weights decide.
    """
    return [
        message
        for check in (_text, _weights, _best_by, _device, _folders)
        for message in check(config)
    ]


def _text(config: Config) -> Iterator[str]:
    evaluators = config.training.evaluators
    scored = [one.source for one in evaluators if isinstance(one, TextEvaluatorConfig)]
    for error in unreadable([*config.data.train, *(config.data.val or ()), *scored]):
        yield str(error)


def _weights(config: Config) -> Iterator[str]:
    """Weights to start from, and frozen models; those of Hugging Face are not downloaded."""
    source, frozen = config.training.init_from, config.training.objective.frozen_models()
    if source is not None and not is_pretrained(source):
        yield from _refused(lambda: _require_run(source, config))
    if frozen and not any(is_pretrained(one.source) for one in frozen.values()):
        from ultrathink.recipes.parts.models import find_frozen

        yield from _refused(lambda: find_frozen(config))
    tokenizer = config.tokenizer
    if isinstance(tokenizer, HuggingFaceTokenizerConfig) and source is None and not frozen:
        yield from _refused(lambda: TOKENIZERS.load(tokenizer.type).train(tokenizer, ()))


def _require_run(source: str, config: Config) -> None:
    """Refuse weights that are missing, damaged or of another shape or vocabulary."""
    from ultrathink.data.tokenizers.base import load_tokenizer
    from ultrathink.recipes.parts.initial_weights import check_vocabulary
    from ultrathink.runs.conversion import conversion
    from ultrathink.runs.loading import check_loads, model_config_of, weights_from

    weights, run = weights_from(source, config.run.dir)
    if run is not None:
        check_vocabulary(config, load_tokenizer(run.tokenizer))
    is_as_it_is = conversion(model_config_of(weights), config.model) is None
    if (weights / "state.json").is_file() and is_as_it_is:
        check_loads(weights, config.model)


def _best_by(config: Config) -> Iterator[str]:
    if config.training.checkpoint.best_by != CheckpointConfig().best_by:
        from ultrathink.recipes.parts.initial_weights import check_best_by

        yield from _refused(lambda: check_best_by(config.training))


def _device(config: Config) -> Iterator[str]:
    if config.training.device not in ("auto", "cpu"):
        from ultrathink.training.hardware import choose_device

        yield from _refused(lambda: choose_device(config.training.device))


def _folders(config: Config) -> Iterator[str]:
    for key, text in (("run.dir", config.run.dir), ("data.cache_dir", config.data.cache_dir)):
        if text is None:
            continue
        place = Path(text).expanduser().absolute()
        there = next(path for path in (place, *place.parents) if path.exists())
        if not there.is_dir():
            yield f"{key} = {text!r}: {there} is a file; name a folder."
        elif not os.access(there, os.W_OK):
            yield f"{key} = {text!r}: you may not write to {there}; name another folder."


def _refused(act: Callable[[], object]) -> Iterator[str]:
    try:
        act()
    except UltrathinkError as error:
        yield str(error)
