"""Resumes a run: bit for bit as if it had not stopped, or with changes that are recorded."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from ultrathink.checkpoint.format import load_checkpoint
from ultrathink.config.objective import OBJECTIVES
from ultrathink.core.protocols import State
from ultrathink.data.documents import Progress as DataProgress
from ultrathink.data.prepare import PreparedData
from ultrathink.data.tokenizers.base import load_tokenizer
from ultrathink.parallel.world import join_world
from ultrathink.recipes.parts.assembly import assemble, build_model
from ultrathink.recipes.parts.evaluators import make_evaluators
from ultrathink.recipes.parts.folder import environment, environment_changes
from ultrathink.recipes.parts.initial_weights import check_vocabulary
from ultrathink.recipes.parts.models import find_frozen, models_beside
from ultrathink.recipes.parts.resume_plan import FreshStart, ResumePlan, plan_resume
from ultrathink.recipes.parts.resumed_data import data_to_resume_with, keep_record
from ultrathink.recipes.parts.resumed_snapshots import bring_back_snapshots
from ultrathink.recipes.parts.resumed_state import adapt_state, check_identity
from ultrathink.recipes.train import trainer_at_start
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.loading import check_loads
from ultrathink.runs.out_of_memory import remove_out_of_memory
from ultrathink.runs.segments import Segment, append_segment, differences
from ultrathink.training.callbacks import Callback, Controller
from ultrathink.training.choices import choose_together
from ultrathink.training.model_state import region_needed
from ultrathink.training.trainer import Trainer


def resume_trainer(
    run: RunFolder,
    checkpoint: str = "last",
    *,
    overrides: Sequence[str] = (),
    reset: Sequence[str] = (),
    callbacks: Sequence[Callback] = (),
    controllers: Sequence[Controller] = (),
    progress: DataProgress | None = None,
) -> Trainer:
    """A trainer that resumes ``run`` from a checkpoint, bit for bit as if it had not stopped.

    ``overrides`` ("dotted.key=value") change the run from now on; ``reset`` restarts the
    ``optimizer``, the ``schedule`` or the order of the ``data``. Both are recorded in the run's
    ``segments.jsonl``. Raises ConfigError, DataError or CheckpointError.
    """
    plan = plan_resume(run, checkpoint, overrides=overrides, reset=reset)
    return build_resumed(plan, callbacks=callbacks, controllers=controllers, progress=progress)


def build_resumed(
    plan: ResumePlan | FreshStart,
    *,
    callbacks: Sequence[Callback] = (),
    controllers: Sequence[Controller] = (),
    progress: DataProgress | None = None,
) -> Trainer:
    """The trainer of ``plan``; the resume is recorded in the run's ``segments.jsonl``."""
    try:
        if isinstance(plan, FreshStart):
            config = plan.run.read_config()
            return trainer_at_start(config, plan.run, plan.lock, callbacks, controllers, progress)
        return _resume(plan, callbacks, controllers, progress)
    except BaseException:
        plan.release()
        raise


def _resume(
    plan: ResumePlan,
    callbacks: Sequence[Callback],
    controllers: Sequence[Controller],
    progress: DataProgress | None,
) -> Trainer:
    run, world = plan.run, join_world()
    tokenizer = load_tokenizer(run.tokenizer)
    data_hash = plan.plain["identity"]["data_hash"]
    found = world.main_first(
        lambda: data_to_resume_with(run, plan.config, plan.changes, data_hash, tokenizer, progress)
    )
    data: PreparedData = found.data
    check_vocabulary(plan.config, data.tokenizer)
    frozen = world.main_first(lambda: find_frozen(plan.config))
    beside = [each.checked(plan.config, data.tokenizer) for each in frozen]
    config, choices = choose_together(plan.config, data.num_samples, world, beside, models_beside)
    kind = OBJECTIVES.load(config.training.objective.type).kind
    check_loads(plan.folder, config.model, kind)  # for another model it names the difference
    evaluators = make_evaluators(config, data, world, choices.dims, progress)
    model = build_model(config)
    trainer = assemble(
        config, run, data, model, choices, callbacks, controllers, frozen, evaluators
    )
    region = partial(region_needed, trainer.objective.models)
    state: State = load_checkpoint(plan.folder, region=region, kind=kind)
    reset = plan.reset | {"data"} if found.other_samples else plan.reset
    check_identity(plan.plain["identity"], trainer.identity, reset)
    adapt_state(
        state, trainer.parts, plan.before, plan.changes, reset, other_scores=found.other_scores
    )
    trainer.load_state_dict(state)
    lost = bring_back_snapshots(
        *(trainer.parts, trainer.control, config.orchestrator, plan.folder),
        *(plan.plain, plan.changes, reset),
    )
    trainer.loader.mix_by([source.weight for source in config.data.train])
    trainer.lock = plan.lock
    here = environment(choices)
    trainer.remarks = [
        *plan.remarks,
        *trainer.remarks,
        *((text, "warning") for text in found.notes),
        *((text, "warning") for text in lost),
        *((text, "warning") for text in environment_changes(run, here)),
    ]
    world.barrier()  # all have read the files that are removed or written now
    if not world.is_main:
        return trainer
    run.remove_after(trainer.progress.step)
    if "training.micro_batch_size" in plan.given:
        remove_out_of_memory(run)  # the user wants to try this size
    # The segment first: if this start dies right here, the next resume uses it.
    append_segment(
        run.segments,
        Segment(
            from_step=plan.step,
            changes=tuple(differences(plan.before, config)),
            reset=tuple(sorted(reset)),
            notes=tuple(found.notes),
            environment=here,
        ),
    )
    run.write_config(config)
    keep_record(run, data)
    return trainer
