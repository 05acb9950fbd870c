"""The whole configuration, and the checks that span sections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, PrivateAttr, model_validator

from ultrathink.config.base import Section
from ultrathink.config.data import DataConfig
from ultrathink.config.model import ModelConfig
from ultrathink.config.monitoring import MonitoringConfig
from ultrathink.config.orchestrator import OrchestratorConfig
from ultrathink.config.parallel import ParallelConfig
from ultrathink.config.run import RunConfig
from ultrathink.config.tokenizer import BpeTokenizerConfig, TokenizerField
from ultrathink.config.training import TrainingConfig

DEFAULT = "default"


class Config(Section):
    """Every option of a run."""

    run: RunConfig = Field(RunConfig(), description="Name, place and seed of the run.")
    model: ModelConfig = Field(ModelConfig(), description="The network.")
    tokenizer: TokenizerField = Field(
        BpeTokenizerConfig(), description="How text becomes token ids."
    )
    data: DataConfig = Field(DataConfig(), description="Text sources and sequences.")
    training: TrainingConfig = Field(description="The course of training.")
    orchestrator: OrchestratorConfig = Field(
        OrchestratorConfig(), description="Who watches the run."
    )
    parallel: ParallelConfig = Field(
        ParallelConfig(), description="How the run is spread over processes."
    )
    monitoring: MonitoringConfig = Field(MonitoringConfig(), description="Where metrics go.")

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

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
    def _the_host_can_move_the_weights(self) -> Config:
        kind = self.training.optimizer.type
        if self.parallel.offload == "optimizer" and kind != "adamw":
            raise ValueError(
                f"parallel.offload = 'optimizer' with training.optimizer.type = {kind!r}: what it "
                f"computes would run on the host as well; use adamw, or parallel.offload=params"
            )
        return self

    def __eq__(self, other: object) -> bool:
        """Equal values are equal configurations, wherever they came from."""
        if not isinstance(other, Config):
            return NotImplemented
        return self.model_dump() == other.model_dump()

    def __hash__(self) -> int:
        return hash(tuple(getattr(self, name) for name in type(self).model_fields))

    def origin(self, key: str) -> str:
        """Where the value of a dotted key came from; "default" when nothing set it."""
        while key:
            if key in self._origins:
                return self._origins[key]
            key = key.rpartition(".")[0]
        return DEFAULT

    @property
    def origins(self) -> dict[str, str]:
        """Every recorded origin, by dotted key."""
        return dict(self._origins)

    def with_origins(self, origins: Mapping[str, str]) -> Config:
        """The same values, with ``origins`` as their record."""
        copy = self.model_copy()
        copy._origins = dict(origins)
        return copy

    def replace(self, values: Mapping[str, Any], *, origin: str) -> Config:
        """A checked copy with the dotted keys of ``values`` set, each recorded as ``origin``."""
        tree = self.model_dump(mode="json")
        for key, value in values.items():
            *parents, leaf = key.split(".")
            node = tree
            for parent in parents:
                node = node[parent]
            node[leaf] = value
        changed = Config.model_validate(tree)
        return changed.with_origins({**self._origins, **dict.fromkeys(values, origin)})


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings and lists by dotted key; empty ones are leaves."""
    items: list[tuple[str, Any]]
    if isinstance(tree, Mapping):
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list) and any(isinstance(item, Mapping) for item in tree):
        items = [(str(index), value) for index, value in enumerate(tree)]
    else:
        return {prefix: tree}
    if not items:
        return {prefix: tree}
    leaves: dict[str, Any] = {}
    for name, value in items:
        leaves.update(flatten(value, f"{prefix}.{name}" if prefix else name))
    return leaves
