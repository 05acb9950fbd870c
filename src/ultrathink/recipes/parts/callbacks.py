"""Callbacks that need parts which the trainer does not know."""

from __future__ import annotations

from ultrathink.config.schema import Config
from ultrathink.data.tokenizers.base import Tokenizer
from ultrathink.inference.engine import Engine
from ultrathink.inference.sampling import SamplingParams
from ultrathink.model.transformer import Transformer
from ultrathink.monitoring.records import Sink
from ultrathink.parallel.placement import whole_weights
from ultrathink.parallel.world import World
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.loading import empty_model
from ultrathink.training.callbacks import Callback, StepReport
from ultrathink.training.endings import Ending


class StepBudgetRecorder(Callback):
    """Writes the length that the run came to, in steps, into its configuration."""

    def __init__(self, run: RunFolder, config: Config) -> None:
        self.run = run
        self.config = config

    def on_budget(self, total_steps: int) -> None:
        training = self.config.training
        if training.max_steps is None and training.step_budget != total_steps:
            self.config = self.config.replace(
                {"training.step_budget": total_steps},
                origin="chosen at run time: what the length comes to at the measured speed"
                if training.max_minutes is not None
                else "chosen at run time: what the length comes to",
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
        model = self.model
        if self.world.size > 1 and sample.prompts:
            weights = whole_weights(model)  # all processes give their parts
            if not self.world.is_main:
                return
            model = empty_model(self.config.model)
            model.load_state_dict(weights)
            model.eval()
        engine = Engine(model, self.tokenizer)
        params = SamplingParams(
            max_new_tokens=sample.max_new_tokens,
            temperature=sample.temperature,
            top_p=sample.top_p,
            seed=self.config.run.seed,
        )
        for prompt in sample.prompts:
            text = engine.generate(prompt, params).text
            self.sink.sample(self._step, prompt, text)
