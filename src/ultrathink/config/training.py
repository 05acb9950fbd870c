"""Section ``training``: how long, how large, how precise, and what is kept."""

from __future__ import annotations

from functools import partial
from typing import Literal

from pydantic import model_validator

from ultrathink.config.base import Section, alike
from ultrathink.config.evaluators import EvaluatorField, SampleConfig
from ultrathink.config.model import Checkpointing
from ultrathink.config.objective import ObjectiveField, PretrainConfig
from ultrathink.config.optimizer import (
    AdamWConfig,
    CosineConfig,
    OptimizerField,
    ScheduleField,
)
from ultrathink.config.options import felt, fixed, free
from ultrathink.core.durations import Duration

BUDGETS = ("max_steps", "max_tokens", "max_minutes", "epochs")

length = partial(felt, decides=("length",))


class CheckpointConfig(Section):
    """When the run is saved and what is kept."""

    every_steps: int | None = free(None, gt=0)
    """Save after every so many steps; the last step is always saved."""
    every_minutes: float | None = free(None, gt=0)
    """Save after every so many minutes of training."""
    keep: int = free(2, gt=0)
    """Newest checkpoints kept, besides best and last."""
    best_by: str = free("loss", decides=("scores",))
    """Validation figure by which `best` is chosen: one of the objective's, such as loss or
    token_accuracy."""
    retry_s: float = free(60.0, gt=0)
    """Seconds until a checkpoint that could not be written (a full disk) is retried; training
    continues meanwhile."""
    patience_minutes: float = free(60.0, ge=0)
    """Minutes that a run waits at its end for a disk that cannot take the last checkpoint."""


class EvalConfig(Section):
    """When the model is validated, and on how much."""

    every_steps: int | None = free(None, gt=0)
    """Validate after every so many steps; the last step always is."""
    batch_size: int = free(16, gt=0)
    """Sequences in one validation batch."""
    max_tokens: int | None = free(None, decides=("scores",), gt=0)
    """Use only so many held-out tokens; all of them when unset."""
    paths: tuple[str, ...] = free(())
    """Compute paths of the model whose loss is measured too, as loss/<path>."""


class TrainingConfig(Section):
    """The course of training."""

    max_steps: int | None = length(None, gt=0)
    """Length in optimizer steps."""
    max_tokens: int | None = length(None, gt=0)
    """Length in training tokens."""
    max_minutes: float | None = length(None, gt=0)
    """Length in minutes from the first training step, compilation and validation included,
    tokenizing not."""
    epochs: float | None = length(None, gt=0)
    """Length in passes over the data."""
    step_budget: int | None = length(
        None,
        rests_on=("training.batch_size", "data.seq_len", "data.train"),
        is_compared=False,
        gt=0,
    )
    """The length in optimizer steps; chosen at run time and kept on resuming."""
    batch_size: int = felt(32, decides=("steps",), gt=0)
    """Sequences per optimizer step, over all devices and micro-batches."""
    micro_batch_size: int | Literal["auto"] = free(
        "auto",
        rests_on=(
            "training.batch_size",
            "training.device",
            "training.activation_checkpointing",
            "data.seq_len",
        ),
    )
    """Sequences in one forward pass of one device."""
    device: str = free("auto")
    """auto, cpu, cuda, cuda:1, mps."""
    precision: Literal["auto", "fp32", "bf16", "fp64"] = felt("auto", rests_on=("training.device",))
    """Number format of the products; weights are kept in fp32 (fp64)."""
    compile: bool | Literal["auto"] = free("auto", rests_on=("training.device",))
    """Compile the model; auto compiles when the run is long enough to pay."""
    deterministic: bool = free(False)
    """Give the same bits in every run on one machine: deterministic kernels, and no choice that
    depends on a measurement or the clock."""
    activation_checkpointing: Checkpointing = free("none")
    """Recompute activations in the backward pass: full (all of a block), selective (all but the
    products; not in compiled runs), none."""
    clip: float | None = felt(1.0, gt=0)
    """Largest global gradient norm; larger ones are scaled down."""
    log_every: int = free(10, gt=0)
    """Steps between logged steps."""
    objective: ObjectiveField = felt(PretrainConfig())
    """What is learned."""
    optimizer: OptimizerField = felt(AdamWConfig())
    """What moves the weights."""
    schedule: ScheduleField = felt(CosineConfig())
    """Course of the learning rate."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """What is saved."""
    eval: EvalConfig = EvalConfig()
    """Validation."""
    evaluators: tuple[EvaluatorField, ...] = free(())
    """What else is measured during training, each under its name."""
    sample: SampleConfig = SampleConfig()
    """Text that the model writes at the end, as a first look."""
    init_from: str | None = fixed(None, because="the run has its own weights by now")
    """Run folder or checkpoint whose weights training starts from, or hf:PATH_OR_NAME for a model
    of Hugging Face, which sets model and tokenizer."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainingConfig:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            listed = ", ".join(BUDGETS)
            raise ValueError(
                f"give exactly one of {listed}; "
                + (f"given: {' and '.join(given)}" if given else "none is given")
            )
        return self

    @model_validator(mode="after")
    def _evaluators_differ(self) -> TrainingConfig:
        twice = alike([one.label for one in self.evaluators])
        if twice is not None:
            raise ValueError(f"two evaluators are called {twice!r}; give each its own name")
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> TrainingConfig:
        micro = self.micro_batch_size
        if isinstance(micro, int) and (micro < 1 or self.batch_size % micro):
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of micro_batch_size ({micro}), "
                f"or micro_batch_size must be auto"
            )
        return self

    @model_validator(mode="after")
    def _no_clock_where_bits_must_repeat(self) -> TrainingConfig:
        if not self.deterministic:
            return self
        if self.max_minutes is not None:
            raise ValueError(
                f"deterministic is true, and max_minutes = {self.max_minutes:g} follows the clock: "
                f"each run would have another number of steps; give the length in steps "
                f"(training.max_steps=2000), tokens or epochs"
            )
        for name in type(self.schedule).model_fields:
            value = getattr(self.schedule, name)
            if isinstance(value, Duration) and value.unit == "minutes":
                raise ValueError(
                    f"deterministic is true, and schedule.{name} = '{value}' follows the clock; "
                    f"give it as a share of the run (training.schedule.{name}=5%), in steps or "
                    f"in tokens"
                )
        return self
