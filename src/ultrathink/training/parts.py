"""The parts of a run that changes act on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from ultrathink.core.protocols import State
from ultrathink.core.random import random_state, set_random_state
from ultrathink.data.batch import Batch
from ultrathink.data.loader import TrainLoader
from ultrathink.model.transformer import Transformer
from ultrathink.parallel.world import Group, World
from ultrathink.runs.folder import RunFolder
from ultrathink.training.clock import Clock
from ultrathink.training.endings import Ending
from ultrathink.training.host_states import Snapshots
from ultrathink.training.length import Length
from ultrathink.training.model_set import ModelSet
from ultrathink.training.model_state import (
    MODULES,
    ModelState,
    ModulesState,
    OptimizerState,
    SettingsState,
)
from ultrathink.training.run_state import Progress, RunState
from ultrathink.training.saving import Saving
from ultrathink.training.settings import LiveSettings
from ultrathink.training.stepping import Step
from ultrathink.training.validation import Scores


@dataclass
class Boundary:
    """What the loop must do at the end of a step boundary."""

    ending: Ending | None = None
    save: bool = False
    is_best: bool = False  # this step's weights have the best score so far
    reason: str = ""  # of the change that is being applied
    expert_load: Tensor | None = None  # [L, E] of the last step: this process's tokens
    batch: Batch | None = None  # of the last step: this process's share


@dataclass(frozen=True)
class Parts:
    """The parts of a run that changes act on.

    ``share`` is the number of sequences of a batch on this process, ``held_out`` scores the current
    model (None without held-out text), ``report_scores`` passes such scores to callbacks,
    ``is_asked`` is whether further changes are waiting.
    """

    models: ModelSet
    stepper: Step
    loader: TrainLoader
    settings: LiveSettings
    progress: Progress
    clock: Clock
    length: Length
    state: RunState
    snapshots: Snapshots
    saving: Saving
    run: RunFolder
    world: World
    dp_group: Group
    share: int
    held_out: Callable[[], Scores | None]
    report_scores: Callable[[Scores], None]
    is_asked: Callable[[], bool]
    boundary: Boundary = field(default_factory=Boundary)

    @property
    def model(self) -> Transformer:
        """The main model."""
        return self.models.main

    def register(self) -> None:
        """Register the states of these parts, in the order in which they are loaded."""
        register = self.state.register
        model, modules = ModelState(self.model), ModulesState(self.models.beside)
        optimizer = OptimizerState(self.stepper)
        settings = SettingsState(self.settings, self.models, self.stepper.optimizers, self.share)
        progress, length = self.progress, self.length
        register("model", model.state_dict, model.load_state_dict, is_required=True)
        if self.models.beside:
            register(MODULES, modules.state_dict, modules.load_state_dict, is_required=True)
        register("optimizer", optimizer.state_dict, optimizer.load_state_dict)
        register("random", random_state, set_random_state)
        register("data", self.loader.state_dict, self.loader.load_state_dict)
        register(
            "settings", settings.state_dict, settings.load_state_dict, roll_back=settings.roll_back
        )
        register("progress", self._progress_state, progress.load_state_dict, is_required=True)
        register("budget", length.state_dict, length.load_state_dict)

    def _progress_state(self) -> State:
        self.progress.elapsed_s = self.clock.elapsed_s
        return self.progress.state_dict()
