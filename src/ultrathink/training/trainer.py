"""The training loop, and what a run remembers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ultrathink.config.training import TrainingConfig
from ultrathink.core.protocols import State, Stateful
from ultrathink.core.random import random_state, set_random_state
from ultrathink.data.loader import TrainLoader
from ultrathink.data.validation import ValidationSet
from ultrathink.monitoring.records import RunInfo
from ultrathink.runs.folder import RunFolder
from ultrathink.training.budget import Budget, Speed, resolve_budget
from ultrathink.training.callbacks import Callback, Controller, Ending, StepReport, ValidationReport
from ultrathink.training.changes import apply_change
from ultrathink.training.control import ControlQueue, LiveSettings, Snapshot
from ultrathink.training.hardware import synchronize
from ultrathink.training.optimizers import load_optimizer_state, optimizer_state
from ultrathink.training.schedules import Factor, build_schedule
from ultrathink.training.stepping import Stepper
from ultrathink.training.validation import Scores, evaluate

# Steps timed to turn minutes into steps: this share of the run's minutes, and at least so many.
_TRIAL_SHARE = 0.012
_TRIAL_MIN_STEPS = 5


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    num_skipped: int = 0
    best: float | None = None  # the best validation figure so far
    last_validation: int = 0  # step
    last_checkpoint: int = 0  # step
    last_checkpoint_s: float = 0.0  # elapsed time


@dataclass
class Trainer:
    """Trains ``model`` from ``loader`` into ``run``; made by ``ultrathink.build_trainer``.

    ``fit`` is the loop. ``control`` is how a run is changed from outside; every change waits for
    the step boundary.
    """

    model: nn.Module
    loader: TrainLoader
    stepper: Stepper
    training: TrainingConfig
    run: RunFolder
    settings: LiveSettings
    device: torch.device
    held_out: ValidationSet | None = None
    callbacks: Sequence[Callback] = ()
    controllers: Sequence[Controller] = ()
    tokens_per_step: int = 1
    identity: dict[str, Any] = field(default_factory=dict)  # hashes kept in every checkpoint
    heading: str = ""
    warnings: Sequence[str] = ()  # said once the run has a place to say them
    budget: Budget | None = None
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self.control = ControlQueue(self.take_snapshot)
        self.ending: Ending | None = None
        self._schedule: Factor | None = None
        self._clock: float | None = None
        self._failures: set[str] = set()

    # -- the loop ------------------------------------------------------------------------------

    def fit(self) -> Ending:
        """Train to the end of the budget, or until a controller or a signal asks to stop."""
        try:
            self.start()
            while self.ending is None:
                report = self.train_step()
                self.notify("on_step", report)
                if self._is_due(self.training.eval.every_steps):
                    self.validate()
                if self._checkpoint_is_due():
                    self.save()
                for controller in self.controllers:
                    controller.at_boundary(report, self.control)
                self.apply_changes()
                self._end_if_over()
            self.finish()
        finally:
            self.progress.elapsed_s, self._clock = self.elapsed_s(), None
            self.loader.close()
            self.notify("on_end", self.ending)
        return self.ending

    def start(self) -> None:
        """Announce the run and fix its length in steps."""
        self.model.train()
        self._clock = time.perf_counter() - self.progress.elapsed_s
        self.notify(
            "on_start",
            RunInfo(
                name=self.run.name,
                folder=self.run.path,
                total_steps=self.budget.total_steps if self.budget is not None else 0,
                start_step=self.progress.step,
                heading=self.heading,
            ),
        )
        for warning in self.warnings:
            self.notify("on_message", warning, "warning")
        if self.training.compile:
            self.notify("on_message", "compiling the model; the first step takes longer", "info")
        if self.budget is None:
            self.budget = resolve_budget(
                self.training,
                tokens_per_step=self.tokens_per_step,
                samples_per_epoch=self.loader.num_samples,
                measure_speed=self._measure_speed,
            )
        self._schedule = build_schedule(self.training.schedule, self.budget)
        self.notify("on_budget", self.budget.total_steps)
        self._end_if_over()

    def train_step(self) -> StepReport:
        """Take the next batch and learn from it."""
        assert self._schedule is not None
        began = time.perf_counter()
        batch = self.loader.next_batch()
        lr_factor = self._schedule(self.progress.step + 1)
        result = self.stepper.take_step(batch, self.settings, lr_factor)
        self.progress.step += 1
        self.progress.tokens += self.tokens_per_step
        self.progress.num_skipped += result.skipped
        if result.skipped:
            self.notify(
                "on_message",
                f"step {self.progress.step} was skipped: loss {result.loss}, gradient norm "
                f"{result.grad_norm}, {result.num_tokens} trained tokens",
                "warning",
            )
        return StepReport(
            step=self.progress.step,
            loss=result.loss,
            aux_losses=result.aux_losses,
            grad_norm=result.grad_norm,
            lr=self.stepper.learning_rate(self.settings, lr_factor),
            num_tokens=result.num_tokens,
            tokens=self.progress.tokens,
            seconds=time.perf_counter() - began,
            skipped=result.skipped,
            num_skipped=self.progress.num_skipped,
        )

    def validate(self) -> None:
        """Score the held-out text; a best score is saved as the ``best`` checkpoint."""
        if self.held_out is None:
            return
        began = time.perf_counter()
        scores = self._evaluate(self.held_out)
        figure = -scores.loss
        if self.training.checkpoint.best_by == "token_accuracy":
            figure = scores.token_accuracy
        is_best = self.progress.best is None or figure > self.progress.best
        if is_best:
            self.progress.best = figure
        self.progress.last_validation = self.progress.step
        self.notify(
            "on_validation",
            ValidationReport(
                step=self.progress.step,
                tokens=self.progress.tokens,
                loss=scores.loss,
                ppl=scores.ppl,
                bits_per_byte=scores.bits_per_byte,
                token_accuracy=scores.token_accuracy,
                num_tokens=scores.num_tokens,
                seconds=time.perf_counter() - began,
                is_best=is_best,
            ),
        )
        if is_best:
            self.save(is_best=True)

    def finish(self) -> None:
        """Validate and save what the last step left; a run that was stopped is only saved."""
        progress = self.progress
        if progress.step == 0:
            return
        if self.ending != "stopped" and progress.last_validation < progress.step:
            self.validate()
        if progress.last_checkpoint < progress.step:
            self.save()

    def _end_if_over(self) -> None:
        if self.ending is not None:
            return
        assert self.budget is not None
        limit = self.training.max_minutes
        if self.progress.step >= self.budget.total_steps:
            self.ending = "finished"
        elif limit is None or self.progress.step == 0:  # however short, a run takes one step
            return
        elif self.elapsed_s() >= limit * 60 - self.budget.reserve_s:
            self.ending = "out of time"

    # -- changes -------------------------------------------------------------------------------

    def apply_changes(self) -> None:
        """Do what was asked through ``control``, and report each change."""
        for setting, value, reason in self.control.take():
            change = apply_change(self, setting, value, reason)
            self.notify("on_change", change)

    def take_snapshot(self) -> Snapshot:
        """A copy of the whole state, in memory."""
        return Snapshot(self.progress.step, _cloned(self.state_dict()))

    def notify(self, event: str, *details: Any) -> None:
        """Tell every callback; one that fails is reported once and changes nothing."""
        for callback in self.callbacks:
            try:
                getattr(callback, event)(*details)
            except Exception as error:
                name = type(callback).__name__
                text = f"{name}.{event} failed: {type(error).__name__}: {error}"
                if text not in self._failures and event != "on_message":
                    self._failures.add(text)
                    self.notify("on_message", text, "warning")

    # -- saving --------------------------------------------------------------------------------

    def save(self, *, is_best: bool = False) -> None:
        """Write a checkpoint of this step."""
        self.progress.last_checkpoint = self.progress.step
        self.progress.last_checkpoint_s = self.elapsed_s()
        path = self.run.save(
            self.progress.step,
            self.state_dict(),
            is_best=is_best,
            keep=self.training.checkpoint.keep,
        )
        self.notify("on_checkpoint", self.progress.step, path)

    def state_dict(self) -> State:
        """All that a run remembers; with the same files it goes on bit for bit from here."""
        self.progress.elapsed_s = self.elapsed_s()
        return {
            "model": dict(self.model.state_dict()),
            "optimizer": optimizer_state(self.stepper.optimizers, self.model),
            "random": random_state(),
            "data": self.loader.state_dict(),
            "settings": self.settings.state_dict(),
            "progress": asdict(self.progress),
            "budget": self.budget.to_dict() if self.budget is not None else None,
            "callbacks": _states(self.callbacks),
            "controllers": _states(self.controllers),
            "identity": self.identity,
        }

    def load_state_dict(self, state: State) -> None:
        """Go back to what ``state_dict`` returned."""
        values: dict[str, Any] = dict(state)
        self.model.load_state_dict(values["model"])
        load_optimizer_state(self.stepper.optimizers, self.model, values["optimizer"])
        set_random_state(values["random"])
        self.loader.load_state_dict(values["data"])
        self.settings.load_state_dict(values["settings"])
        self.progress = Progress(**values["progress"])
        if values["budget"] is not None:
            self.budget = Budget(**values["budget"])
        _load_states(self.callbacks, values["callbacks"])
        _load_states(self.controllers, values["controllers"])

    def elapsed_s(self) -> float:
        """Seconds of training so far, over all its sessions, compilation included."""
        if self._clock is None:
            return self.progress.elapsed_s
        return time.perf_counter() - self._clock

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self.progress.step % every == 0

    def _checkpoint_is_due(self) -> bool:
        rule = self.training.checkpoint
        if self.progress.last_checkpoint == self.progress.step:
            return False
        since = self.elapsed_s() - self.progress.last_checkpoint_s
        is_time = rule.every_minutes is not None and since >= rule.every_minutes * 60
        return is_time or self._is_due(rule.every_steps)

    # -- speed ---------------------------------------------------------------------------------

    def _measure_speed(self) -> Speed:
        """Time a few real steps and a piece of validation, then undo them."""
        before = self.take_snapshot()
        trial_s = (self.training.max_minutes or 0.0) * 60 * _TRIAL_SHARE
        self.stepper.take_step(self.loader.next_batch(), self.settings, 0.0)  # compiles
        step_s: list[float] = []
        while len(step_s) < _TRIAL_MIN_STEPS or sum(step_s) < trial_s:
            began = time.perf_counter()
            self.stepper.take_step(self.loader.next_batch(), self.settings, 0.0)
            synchronize(self.device)
            step_s.append(time.perf_counter() - began)
        validation_s = self._estimate_validation()
        self.load_state_dict(before.state)
        return Speed(
            step_s=sum(step_s) / len(step_s),
            validation_s=validation_s,
            elapsed_s=self.elapsed_s(),
        )

    def _estimate_validation(self) -> float:
        """Seconds that a whole validation will take, from three batches of it."""
        if self.held_out is None:
            return 0.0
        self._evaluate(self.held_out, max_batches=1)  # the first pays for fresh memory
        began = time.perf_counter()
        scores = self._evaluate(self.held_out, max_batches=3)
        num_tokens, _ = self.held_out.extent(self.training.eval.max_tokens)
        return (time.perf_counter() - began) * num_tokens / max(1, scores.num_tokens)

    def _evaluate(self, held_out: ValidationSet, max_batches: int | None = None) -> Scores:
        return evaluate(
            self.model,
            held_out,
            device=self.device,
            batch_size=self.training.eval.batch_size,
            max_tokens=self.training.eval.max_tokens,
            max_batches=max_batches,
        )


def _states(parts: Sequence[Stateful]) -> State:
    return {
        f"{number}:{type(part).__name__}": part.state_dict() for number, part in enumerate(parts)
    }


def _load_states(parts: Sequence[Stateful], states: dict[str, Any]) -> None:
    for number, part in enumerate(parts):
        name = f"{number}:{type(part).__name__}"
        if name in states:
            part.load_state_dict(states[name])


def _cloned(node: Any) -> Any:
    if isinstance(node, Tensor):
        return node.detach().clone()
    if isinstance(node, dict):
        return {key: _cloned(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_cloned(value) for value in node]
    return node
