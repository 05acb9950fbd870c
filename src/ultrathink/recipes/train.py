"""Builds a trainer for a new run."""

from __future__ import annotations

from collections.abc import Sequence

from ultrathink.config.overrides import flatten
from ultrathink.config.schema import Config
from ultrathink.data.documents import Progress
from ultrathink.data.prepare import prepare_data
from ultrathink.parallel.world import check_same, join_world
from ultrathink.recipes.parts.assembly import assemble, build_model
from ultrathink.recipes.parts.evaluators import make_evaluators
from ultrathink.recipes.parts.folder import start_folder
from ultrathink.recipes.parts.initial_weights import (
    check_vocabulary,
    find_initial_weights,
    with_prompts,
)
from ultrathink.recipes.parts.models import find_frozen, models_beside
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.lock import RunLock
from ultrathink.training.callbacks import Callback, Controller
from ultrathink.training.choices import choose_together
from ultrathink.training.trainer import Trainer

_SAME_CONFIG = "Start all of them with the same file and the same overrides."


def build_trainer(
    config: Config,
    *,
    callbacks: Sequence[Callback] = (),
    controllers: Sequence[Controller] = (),
    progress: Progress | None = None,
) -> Trainer:
    """A trainer for a new run, with its folder; ``trainer.fit()`` trains.

    ``callbacks`` observe, ``controllers`` may change the run; ``progress(label, done, total)``
    reports the preparation of data. Raises ConfigError, DataError or CheckpointError.
    """
    return trainer_at_start(config, None, None, callbacks, controllers, progress)


def trainer_at_start(
    config: Config,
    run: RunFolder | None,
    lock: RunLock | None,
    callbacks: Sequence[Callback] = (),
    controllers: Sequence[Controller] = (),
    progress: Progress | None = None,
) -> Trainer:
    """A trainer at step 0 in a new folder, or in ``run``, whose ``lock`` is held."""
    world = join_world()
    check_same(world, "configuration", flatten(config.model_dump(mode="json")), _SAME_CONFIG)
    config, initial = world.main_first(lambda: find_initial_weights(config))
    frozen = world.main_first(lambda: find_frozen(config))
    tokenizers = [initial.tokenizer, *(found.tokenizer for found in frozen), config.tokenizer]
    tokenizer = next(each for each in tokenizers if each is not None)
    data = world.main_first(lambda: prepare_data(config.data, tokenizer, progress=progress))
    check_vocabulary(config, data.tokenizer)
    config = with_prompts(config, data)
    beside = [found.checked(config, data.tokenizer) for found in frozen]
    config, choices = choose_together(config, data.num_samples, world, beside, models_beside)
    evaluators = make_evaluators(config, data, world, choices.dims, progress)
    model = build_model(config)
    if initial.fill is not None:
        initial.fill(model)
    run, config, own_lock = start_folder(run, config, data, model, choices)
    trainer = assemble(
        config, run, data, model, choices, callbacks, controllers, frozen, evaluators
    )
    trainer.lock = lock or own_lock
    return trainer
