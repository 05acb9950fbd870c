"""The training loop, and what a run remembers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ultrathink.config.training import TrainingConfig
from ultrathink.core.errors import UltrathinkError
from ultrathink.core.protocols import State, Stateful
from ultrathink.core.random import random_state, set_random_state
from ultrathink.data.loader import TrainLoader
from ultrathink.data.validation import ValidationSet
from ultrathink.monitoring.records import Level, RunInfo
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.lock import RunLock
from ultrathink.training.budget import Budget, Done, Speed, resolve_budget, steps_within
from ultrathink.training.callbacks import Callback, Controller, Ending, StepReport, ValidationReport
from ultrathink.training.changes import apply_change
from ultrathink.training.control import Change, ControlQueue, LiveSettings, Snapshot
from ultrathink.training.hardware import synchronize
from ultrathink.training.optimizers import load_optimizer_state, optimizer_state
from ultrathink.training.saving import Saving
from ultrathink.training.schedules import Factor, continued_schedule
from ultrathink.training.stepping import Stepper
from ultrathink.training.validation import Scores, evaluate

# Steps timed to turn minutes into steps: this share of the run's minutes, and at least so many.
_TRIAL_SHARE = 0.004
_TRIAL_MIN_STEPS = 5
# What was timed at the start may have been a bad moment of a busy machine: once this share of the
# minutes is over, the pace of real steps counts, if it gives a length that differs by this factor.
_SETTLED_AFTER = 0.1
_SETTLED_WITHIN = 1.05


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
    config: dict[str, Any] = field(default_factory=dict)  # the run's configuration, likewise
    lock: RunLock | None = None  # held until the run ends
    heading: str = ""
    remarks: Sequence[tuple[str, Level]] = ()  # said once the run has a place to say them
    budget: Budget | None = None
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self.control = ControlQueue(self.take_snapshot)
        self.saving = Saving(
            self.run,
            self.training.checkpoint,
            on_written=lambda step, path: self.notify("on_checkpoint", step, path),
            on_restored=self._renew_lock,
            tell=lambda text, level: self.notify("on_message", text, level),
        )
        self.ending: Ending | None = None
        self.is_best = False  # this step's weights have the best score so far
        self.save_wanted = False
        self._schedule: Factor | None = None
        self._clock: float | None = None
        self._failures: set[str] = set()
        self._paced: tuple[int, float] = (0, 0.0)  # steps since the start, and their seconds

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
                self.ask_controllers(report)
                self.apply_changes()
                self.settle_length()
                self._end_if_over()
                self.save_if_due()
            self.finish()
        except KeyboardInterrupt:  # asked twice: at once
            self.saving.abandon()
            raise
        finally:
            self.close()
        return self.ending

    def close(self) -> None:
        """Stop what works beside the loop and give the run folder free."""
        self.progress.elapsed_s, self._clock = self.elapsed_s(), None
        self.saving.close()
        self.loader.close()
        self.notify("on_end", self.ending)
        if self.lock is not None:
            self.lock.release()

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
        for text, level in self.remarks:
            self.notify("on_message", text, level)
        if self.training.compile:
            self.notify("on_message", "compiling the model; the first step takes longer", "info")
        if self.budget is None:
            self.budget = resolve_budget(
                self.training,
                tokens_per_step=self.tokens_per_step,
                samples_per_epoch=self.loader.num_samples,
                measure_speed=self._measure_speed,
                done=Done(self.progress.step, self.progress.tokens, self.loader.samples_seen),
            )
        self._schedule = continued_schedule(self.training.schedule, self.budget, self.settings)
        self.notify("on_budget", self.budget.total_steps)
        self._end_if_over()

    def train_step(self) -> StepReport:
        """Take the next batch and learn from it."""
        assert self._schedule is not None
        began = time.perf_counter()
        batch = self.loader.next_batch()
        for note in self.loader.take_notes():
            self.notify("on_message", note, "warning")
        lr_factor = self._schedule(self.progress.step + 1)
        result = self.stepper.take_step(batch, self.settings, lr_factor)
        self.progress.step += 1
        self.progress.tokens += self.tokens_per_step
        self.progress.num_skipped += result.skipped
        seconds = time.perf_counter() - began
        self._paced = (self._paced[0] + 1, self._paced[1] + seconds)
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
            seconds=seconds,
            skipped=result.skipped,
            num_skipped=self.progress.num_skipped,
        )

    def validate(self) -> None:
        """Score the held-out text; a best score makes this step's checkpoint the ``best``."""
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
        self.is_best = is_best

    def finish(self) -> None:
        """Validate and save what the last step left; a run that was stopped is only saved."""
        progress = self.progress
        if progress.step == 0:
            return
        if self.ending != "stopped" and progress.last_validation < progress.step:
            self.validate()
        if self.is_best or self.save_wanted or progress.last_checkpoint < progress.step:
            self.save()
        self.saving.wait_until_written()

    def _end_if_over(self) -> None:
        assert self.budget is not None
        if self.ending is None:
            self.ending = self.budget.ending(
                self.progress.step, self.elapsed_s(), self.training.max_minutes
            )

    def settle_length(self) -> None:
        """Correct a length in minutes once, where real steps are not as fast as the first ones."""
        minutes, budget = self.training.max_minutes, self.budget
        assert budget is not None
        if minutes is None or budget.is_settled or self.ending is not None:
            return
        is_early = self.elapsed_s() < _SETTLED_AFTER * minutes * 60
        if is_early and self.progress.step < budget.total_steps:
            return
        num_steps, seconds = self._paced
        speed = Speed(seconds / num_steps, self._estimate_validation(), self.elapsed_s())
        total = self.progress.step + steps_within(minutes, speed, self.training.eval.every_steps)
        corrected = Budget(total, self.tokens_per_step, speed.step_s, speed.validation_s)
        self.budget = replace(budget, is_settled=True)
        is_over = self.elapsed_s() >= minutes * 60 - corrected.reserve_s
        differs = max(total, budget.total_steps) > _SETTLED_WITHIN * min(total, budget.total_steps)
        if is_over or not differs:
            return
        self.budget = corrected
        self._schedule = continued_schedule(self.training.schedule, self.budget, self.settings)
        reason = f"a step takes {speed.step_s:.3g} s, not {budget.seconds_per_step:.3g}"
        change = Change(
            self.progress.step, "training.step_budget", budget.total_steps, total, reason
        )
        self.notify("on_change", change)
        self.notify("on_budget", total)

    # -- changes -------------------------------------------------------------------------------

    def ask_controllers(self, report: StepReport) -> None:
        """Let each controller ask for changes; one that fails is reported and asked again later."""
        for controller in self.controllers:
            try:
                controller.at_boundary(report, self.control)
            except Exception as error:
                self._report_failure(f"{type(controller).__name__}.at_boundary", error)

    def apply_changes(self) -> None:
        """Do what was asked through ``control``, and report each change."""
        for setting, value, reason in self.control.take():
            try:
                change = apply_change(self, setting, value, reason)
            except UltrathinkError as error:  # a request that cannot be met, such as odd weights
                self._report_failure(f"the change of {setting} ({reason})", error)
            else:
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
                if event != "on_message":
                    self._report_failure(f"{type(callback).__name__}.{event}", error)

    def _report_failure(self, where: str, error: Exception) -> None:
        text = f"{where} failed: {type(error).__name__}: {error}"
        if text not in self._failures:
            self._failures.add(text)
            self.notify("on_message", text, "warning")

    def _renew_lock(self) -> None:
        if self.lock is not None:
            self.lock.renew()  # the lock vanished with the folder

    # -- saving --------------------------------------------------------------------------------

    def save_if_due(self) -> None:
        """Save after all that happens at this step boundary, so that nothing of it is lost."""
        is_due = self.is_best or self.save_wanted or self._checkpoint_is_due()
        if is_due and self.ending is None:  # the end saves after its validation
            self.save()
        self.saving.collect()

    def save(self) -> None:
        """Have a checkpoint of this step written; training goes on meanwhile."""
        self.progress.last_checkpoint = self.progress.step
        self.progress.last_checkpoint_s = self.elapsed_s()
        self.saving.save(self.progress.step, self.state_dict(), is_best=self.is_best)
        self.is_best = self.save_wanted = False

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
            "config": self.config,
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
