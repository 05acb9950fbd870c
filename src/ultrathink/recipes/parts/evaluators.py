"""Builds the evaluators of a run, with parts from layers above them."""

from __future__ import annotations

from ultrathink.config.data import SourceConfig
from ultrathink.config.evaluators import EVALUATORS, SampleConfig
from ultrathink.config.schema import Config
from ultrathink.data.documents import Progress
from ultrathink.data.prepare import PreparedData, prepare_text
from ultrathink.data.validation import ValidationSet
from ultrathink.model.transformer import Transformer
from ultrathink.parallel.mesh import ParallelDims
from ultrathink.parallel.world import World
from ultrathink.recipes.parts.callbacks import continue_prompts
from ultrathink.training.evaluators.base import (
    NO_EVALUATORS,
    AgreeingGroup,
    Agreement,
    EvaluatorParts,
    EvaluatorSet,
    Written,
)


def make_evaluators(
    config: Config, data: PreparedData, world: World, dims: ParallelDims, progress: Progress | None
) -> EvaluatorSet:
    """The evaluators of ``training.evaluators``; DataError if the text of one cannot be read.

    Notes about their texts are added to the notes of ``data``.
    """
    tokenizer, wanted = data.tokenizer, config.training.evaluators
    if not wanted:
        return NO_EVALUATORS
    agreement = Agreement(world)

    def open_text(source: SourceConfig) -> ValidationSet:
        store = prepare_text(source, config.data, tokenizer, progress, data.notes)
        return ValidationSet([store], config.data.seq_len)

    def write(model: Transformer, sample: SampleConfig, seed: int) -> list[Written]:
        return continue_prompts(model, tokenizer, sample, seed)

    parts = EvaluatorParts(
        tokenizer,
        config.training.eval.batch_size,
        open_text,
        write,
        AgreeingGroup(dims.dp_group.rank, dims.dp_group.size, agreement=agreement),
    )
    made = world.main_first(lambda: [EVALUATORS.load(one.type)(one, parts) for one in wanted])
    return EvaluatorSet(made, agreement)
