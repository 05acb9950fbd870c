"""Callbacks that need parts from layers above the trainer."""

from __future__ import annotations

from ultrathink.config.evaluators import SampleConfig
from ultrathink.config.schema import Config
from ultrathink.data.tokenizers.base import Tokenizer
from ultrathink.inference.engine import Engine
from ultrathink.inference.sampling import SamplingParams
from ultrathink.model.transformer import Transformer
from ultrathink.monitoring.records import Sink
from ultrathink.parallel.world import World
from ultrathink.runs.folder import RunFolder
from ultrathink.training.callbacks import Callback, StepReport
from ultrathink.training.endings import Ending
from ultrathink.training.evaluators.base import Written
from ultrathink.training.model_set import inference_view


class StepBudgetRecorder(Callback):
    """Writes the resolved length of the run, in steps, into its configuration."""

    def __init__(self, run: RunFolder, config: Config) -> None:
        self.run = run
        self.config = config

    def on_budget(self, total_steps: int) -> None:
        training = self.config.training
        if training.max_steps is None and training.step_budget != total_steps:
            self.config = self.config.replace(
                {"training.step_budget": total_steps},
                origin="chosen at run time: the length in steps at the measured speed"
                if training.max_minutes is not None
                else "chosen at run time: the length in steps",
            )
            self.run.write_config(self.config)


class SampleWriter(Callback):
    """Lets the model continue each prompt of ``training.sample`` at the end of training."""

    def __init__(
        self, config: Config, model: Transformer, tokenizer: Tokenizer, sink: Sink, world: World
    ) -> None:
        self.config = config
        self.model = model
        self.tokenizer = tokenizer
        self.sink = sink
        self.world = world
        self._step = 0

    def on_step(self, report: StepReport) -> None:
        self._step = report.step

    def on_end(self, ending: Ending | None) -> None:
        if ending is None or ending.can_resume:
            return
        sample = self.config.training.sample
        with inference_view(self.model) as model:
            written = continue_prompts(model, self.tokenizer, sample, self.config.run.seed)
        if self.world.is_main:
            for prompt, one in zip(sample.prompts or (), written, strict=True):
                self.sink.sample(self._step, prompt, one.text)


def continue_prompts(
    model: Transformer, tokenizer: Tokenizer, sample: SampleConfig, seed: int
) -> list[Written]:
    """The model's continuation of each prompt of ``sample``."""
    params = SamplingParams(
        max_new_tokens=sample.max_new_tokens,
        temperature=sample.temperature,
        top_p=sample.top_p,
        seed=seed,
    )
    engine = Engine(model, tokenizer, in_training=True)
    written = [engine.generate(prompt, params) for prompt in sample.prompts or ()]
    return [Written(one.text, one.new_tokens) for one in written]
