"""The configuration of training, and the checks that span its sections."""

from __future__ import annotations

from pydantic import model_validator

from ultrathink.config.data import DataConfig
from ultrathink.config.model import ModelConfig
from ultrathink.config.monitoring import MonitoringConfig
from ultrathink.config.orchestrator import OrchestratorConfig
from ultrathink.config.overrides import Draft
from ultrathink.config.parallel import ParallelConfig
from ultrathink.config.paths import check_groups
from ultrathink.config.root import Root
from ultrathink.config.run import RunConfig
from ultrathink.config.tokenizer import BpeTokenizerConfig, TokenizerField, tokens
from ultrathink.config.training import BUDGETS, TrainingConfig


class Config(Root):
    """Every option of training a model."""

    presets = "presets"
    default_preset = "demo"

    run: RunConfig = RunConfig()
    """Name, place and seed of the run."""
    model: ModelConfig = ModelConfig()
    """The network."""
    tokenizer: TokenizerField = tokens(BpeTokenizerConfig())
    """How text becomes token ids."""
    data: DataConfig = DataConfig()
    """Text sources and sequences."""
    training: TrainingConfig
    """The course of training."""
    orchestrator: OrchestratorConfig = OrchestratorConfig()
    """Who watches the run."""
    parallel: ParallelConfig = ParallelConfig()
    """How the run is spread over processes."""
    monitoring: MonitoringConfig = MonitoringConfig()
    """Where metrics go."""

    @model_validator(mode="after")
    def _vocabulary_covers_the_tokenizer(self) -> Config:
        size = self.model.vocab_size
        if size is not None and size < self.tokenizer.size():
            raise ValueError(
                f"model.vocab_size ({size}) is smaller than the tokenizer's vocabulary "
                f"({self.tokenizer.size()}); raise it, or leave it unset to follow the tokenizer"
            )
        return self

    @model_validator(mode="after")
    def _validated_paths_exist(self) -> Config:
        for name in self.training.eval.paths:
            self.model.path(name)
        return self

    @model_validator(mode="after")
    def _groups_of_sources_exist(self) -> Config:
        moe = self.model.moe
        for index, source in enumerate(self.data.train):
            where = f"data.train.{index}.groups"
            names = check_groups(moe, source.groups, where)
            if source.groups and not (moe and moe.group_gates):
                raise ValueError(
                    f"{where} names {', '.join(source.groups)}, whose gates follow no text: set "
                    f"model.moe.group_gates=true, or leave groups out (there are "
                    f"{', '.join(names)})"
                )
        return self

    @model_validator(mode="after")
    def _the_host_can_move_the_weights(self) -> Config:
        kind = self.training.optimizer.type
        if self.parallel.offload == "optimizer" and kind != "adamw":
            raise ValueError(
                f"parallel.offload = 'optimizer' with training.optimizer.type = {kind!r}: what it "
                f"computes would run on the host as well; use adamw, or parallel.offload=params"
            )
        return self

    @classmethod
    def prepare(cls, draft: Draft) -> None:
        # Its length has no default, and a message about that says more than "training is missing".
        training = draft.tree.setdefault("training", {})
        draft.drop_replaced("training", BUDGETS, "step_budget")
        _drop_prompts_of_another_text(draft)
        model = draft.tree.get("model")
        moe = model.get("moe") if isinstance(model, dict) else None
        source = training.get("init_from") if isinstance(training, dict) else None
        if isinstance(moe, dict) and isinstance(source, str) and source.startswith("hf:"):
            # The checkpoint says how many experts there are, and replaces what has no origin.
            moe.setdefault("groups", [{"name": "experts", "num_experts": 1, "top_k": 1}])

    def derived(self, name: str) -> Config:
        config = self
        if config.run.name is None:
            config = config.replace({"run.name": name}, origin="derived from the config's name")
        for key, (value, reason) in config.model.derived().items():
            config = config.replace({f"model.{key}": value}, origin=f"derived from {reason}")
        if config.model.vocab_size is None:
            size = config.tokenizer.size()
            config = config.replace({"model.vocab_size": size}, origin="derived from the tokenizer")
        return config


def _drop_prompts_of_another_text(draft: Draft) -> None:
    """The prompts of a preset are of its text; other sources get prompts of their own text."""
    key = "training.sample.prompts"
    is_of_preset = draft.origins.get(key, "").startswith("preset")
    if is_of_preset and draft.is_replaced("data.train"):
        draft.set_open(key)
