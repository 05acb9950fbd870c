"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ultrathink.checkpoint.snapshots import SNAPSHOTS
from ultrathink.config.training import TrainingConfig
from ultrathink.core.errors import UltrathinkError
from ultrathink.core.protocols import State, Stateful
from ultrathink.core.random import seed_everything, step_seed
from ultrathink.data.loader import TrainLoader
from ultrathink.model.transformer import Transformer
from ultrathink.monitoring.records import Level, RunInfo
from ultrathink.parallel.mesh import ONE_PROCESS, ParallelDims
from ultrathink.parallel.timing import StepTimes
from ultrathink.parallel.watchdog import FIRST_STEP_FACTOR, Watchdog
from ultrathink.parallel.world import ALONE, World, is_lost_connection
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.lock import RunLock
from ultrathink.training.budget import Done, Speed, resolve_budget
from ultrathink.training.callbacks import (
    Callback,
    Controller,
    StepReport,
    ValidationReport,
    is_logged,
)
from ultrathink.training.clock import Clock
from ultrathink.training.control import ControlQueue
from ultrathink.training.depth import follow_schedule, read_depth
from ultrathink.training.endings import Ending
from ultrathink.training.evaluators.base import NO_EVALUATORS, Evaluations, EvaluatorSet
from ultrathink.training.experts import read_experts
from ultrathink.training.host_states import Snapshots
from ultrathink.training.length import Length, seconds_per_step
from ultrathink.training.memory import memory_share
from ultrathink.training.objectives.base import Objective
from ultrathink.training.out_of_memory_log import OutOfMemoryLog
from ultrathink.training.pace import Pace
from ultrathink.training.parts import Boundary, Parts
from ultrathink.training.records import ChangeRecord
from ultrathink.training.run_state import Progress, RunState
from ultrathink.training.saving import Saving
from ultrathink.training.scoring import Scorer
from ultrathink.training.settings import LiveSettings
from ultrathink.training.stepping import Step, UpdateGuard
from ultrathink.training.validation import Scores


@dataclass
class Trainer:
    """Learns ``objective`` from ``loader`` into ``run``; made by ``ultrathink.build_trainer``.

    ``fit`` is the loop. ``control`` changes the run from outside; every change waits for the step
    boundary.
    """

    objective: Objective
    loader: TrainLoader
    stepper: Step
    training: TrainingConfig
    run: RunFolder
    settings: LiveSettings
    device: torch.device
    callbacks: Sequence[Callback] = ()
    controllers: Sequence[Controller] = ()
    evaluators: EvaluatorSet = NO_EVALUATORS
    tokens_per_step: int = 1
    identity: dict[str, Any] = field(default_factory=dict)  # hashes kept in every checkpoint
    config: dict[str, Any] = field(default_factory=dict)  # the run's configuration, kept there too
    lock: RunLock | None = None  # held until the run ends
    heading: str = ""
    remarks: Sequence[tuple[str, Level]] = ()  # reported once the run has started
    progress: Progress = field(default_factory=Progress)
    world: World = ALONE
    dims: ParallelDims = ONE_PROCESS
    watchdog: Watchdog | None = None

    def __post_init__(self) -> None:
        self.control = ControlQueue(lambda: self.progress.step, shared=self.world.size > 1)
        self.clock = Clock(self.progress)
        self.length = Length(self.training, self.settings)
        self.snapshots = Snapshots()
        for optimizer in self.stepper.optimizers:
            optimizer.register_step_pre_hook(self.snapshots.states.before_writing)
        self.saving = Saving(
            self.run,
            self.training.checkpoint,
            on_written=lambda step, path: self.notify("on_checkpoint", step, path),
            on_restored=self._renew_lock,
            report=self._report,
            world=self.world,
            snapshots=self.snapshots.states,
            header=self.objective.header,
        )
        self.scorer = Scorer(
            self.objective, self.training.eval.batch_size, world=self.world, report=self._report
        )
        self.evaluations = Evaluations(
            self.evaluators,
            self.model,
            seed=self.loader.seed,
            before_each=lambda: self._feed_watchdog(FIRST_STEP_FACTOR),
            on_report=lambda report: self.notify("on_evaluation", report),
            report=self._report,
        )
        self.boundary = Boundary()
        self._all_have_written = True  # all processes have written the last checkpoint
        self._failures: set[str] = set()
        self._memory_share = 0.0  # the largest of all processes
        self._times = StepTimes(self.world, self.stepper.clock)
        self._pace = Pace(self.world.local_size)
        share = self.dims.share(self.training.batch_size)
        self.state = RunState()
        self.parts = Parts(
            models=self.objective.models,
            stepper=self.stepper,
            loader=self.loader,
            settings=self.settings,
            progress=self.progress,
            clock=self.clock,
            length=self.length,
            state=self.state,
            snapshots=self.snapshots,
            saving=self.saving,
            run=self.run,
            world=self.world,
            dp_group=self.dims.dp_group,
            share=share,
            held_out=lambda: self.score() if self.objective.can_score else None,
            report_scores=lambda scores: self.notify("on_scored", scores),
            is_asked=lambda: self.control.num_waiting > 0,
            boundary=self.boundary,
        )
        self.parts.register()
        self.state.register("identity", lambda: self.identity, _keep_own)
        self.state.register("config", lambda: self.config, _keep_own)
        for callback in self.callbacks:
            self.state.register_one_of("callback", callback)
        for controller in self.controllers:
            self.state.register_one_of("controller", controller)
        self._out_of_memory = OutOfMemoryLog(
            *(self.run, self.world, self.settings, self.progress, share),
            lambda record: self.notify("on_change", record),
        )
        self.stepper.on_smaller = self._out_of_memory.on_smaller

    @property
    def model(self) -> Transformer:
        """The main model."""
        return self.objective.model

    def add_callback(self, callback: Callback) -> None:
        """Let ``callback`` observe the run; it receives each event after earlier callbacks."""
        self.callbacks = [*self.callbacks, callback]
        self.state.register_one_of("callback", callback)

    def add_controller(self, controller: Controller) -> None:
        """Let ``controller`` steer the run; it is called after earlier controllers."""
        self.controllers = [*self.controllers, controller]
        self.state.register_one_of("controller", controller)

    def set_guard(self, guard: UpdateGuard) -> None:
        """Ask ``guard`` before each update, starting from its state in the loaded checkpoint.

        Each process sets its own guard.
        """
        self.stepper.guard = guard
        if isinstance(guard, Stateful):
            self.state.register("guard", guard.state_dict, guard.load_state_dict)

    # -- the loop ------------------------------------------------------------------------------

    def fit(self) -> Ending:
        """Train to the end of the budget, or until a controller or a signal asks to stop."""
        try:
            self.start()
            while self.boundary.ending is None:
                report = self.train_step()
                self.notify("on_step", report)
                if self.progress.is_due(self.settings.eval_every):
                    self.validate()
                self.evaluations.run(self.progress)
                self.ask_controllers("at_boundary", report)
                self.agree()
                self.apply_changes()
                self.settle_length()
                self._end_if_over()
                self.save_if_due()
            self.finish()
        except BaseException as error:
            # A second request to stop is immediate. And a write with a lost process never ends.
            if isinstance(error, KeyboardInterrupt) or is_lost_connection(error):
                self.saving.abandon()
            raise
        finally:
            self.close()
        return self.boundary.ending

    @property
    def ending(self) -> Ending | None:
        """Why the run ended; None while it trains."""
        return self.boundary.ending

    def close(self) -> None:
        """Stop the background threads and release the run folder."""
        self.clock.stop()
        if self.watchdog is not None:
            self.watchdog.stop()
        self.saving.close()
        self.loader.close()
        self.notify("on_end", self.boundary.ending)
        if self.lock is not None:
            self.lock.release()

    def start(self) -> None:
        """Announce the run and fix its length in steps."""
        self._feed_watchdog(FIRST_STEP_FACTOR)
        self.objective.models.train()
        self.clock.start()
        self.notify(
            "on_start",
            RunInfo(
                name=self.run.name,
                folder=self.run.path,
                total_steps=self.length.total_steps,
                start_step=self.progress.step,
                heading=self.heading,
            ),
        )
        for text, level in self.remarks:
            self._report(text, level)
        if self.training.compile:
            self._report("compiling the model; the first step takes longer", "info")
        self._out_of_memory.apply_last()
        budget = self.length.budget
        if budget is None:
            budget = resolve_budget(
                self.training,
                tokens_per_step=self.tokens_per_step,
                samples_per_epoch=self.loader.num_samples,
                measure_speed=self._measure_speed,
                done=Done(self.progress.step, self.progress.tokens, self.loader.samples_seen),
            )
        self.length.set(budget)
        self.stepper.allocate_state()
        self.notify("on_budget", budget.total_steps)
        self.agree()
        self._end_if_over()

    def _measure_speed(self) -> Speed:
        """Time a few real steps and part of a validation, then undo them."""
        before = self.state.copy()
        self.stepper.allocate_state()  # after the copy, which would include its zeros

        def take_step() -> None:
            batch = self.objective.prepare(self.loader.next_batch(), self.progress.step + 1)
            self.stepper.take_step(batch, self.settings, 0.0)

        step_s = seconds_per_step(
            take_step,
            self.training.max_minutes or 0.0,
            self.world,
            self.device,
        )
        validation_s = self.scorer.estimated_s()
        self.state.roll_back(before)
        return Speed(step_s, validation_s, self.world.of_main(self.clock.elapsed_s))

    def train_step(self) -> StepReport:
        """Take the next batch and learn from it."""
        began, self.clock.agreed_s, step = time.perf_counter(), None, self.progress.step + 1
        self._feed_watchdog(1 if self.clock.num_steps else FIRST_STEP_FACTOR)
        if self.world.size > 1:  # different random numbers on each process, by step
            rank = self.dims.dp_group.rank
            seed_everything(step_seed(self.loader.seed, self.progress.step, rank))
        batch = self.loader.next_batch()
        data_wait = time.perf_counter() - began
        for note in self.loader.take_notes():
            self._report(note, "warning")
        lr_factor = self.length.lr_factor(step)
        with_figures = is_logged(step, self.training.log_every, self.length.total_steps)
        self.objective.before_step(step)
        follow_schedule(self.model, step, self.length.total_steps, self._report)
        batch = self.objective.prepare(batch, step)
        corrected = lr_factor * self.settings.lr_correction
        result = self.stepper.take_step(batch, self.settings, corrected, with_norms=with_figures)
        self.boundary.expert_load, self.boundary.batch = result.stats.get("expert_load"), batch
        self.progress.step = step
        self.progress.tokens += self.tokens_per_step
        self.progress.num_skipped += result.skipped
        seconds = time.perf_counter() - began
        self.clock.count_step(seconds)
        is_due = self.progress.is_due(self.training.log_every)
        timing, stragglers = self._times.of_step(step, seconds, is_due=is_due)
        for sentence in (*stragglers, *self._pace.of_step(seconds, is_logged=with_figures)):
            self._report(sentence, "warning")
        if result.skipped:
            self._report(
                f"step {step} was skipped: loss {result.loss}, gradient norm "
                f"{result.grad_norm}, {result.num_tokens} trained tokens",
                "warning",
            )
        return StepReport(
            step=step,
            loss=result.loss,
            aux_losses=result.aux_losses,
            grad_norm=result.grad_norm,
            lr=self.stepper.learning_rate(),
            scheduled_lr=self.training.optimizer.lr * lr_factor,
            num_tokens=result.num_tokens,
            tokens=self.progress.tokens,
            seconds=seconds,
            skipped=result.skipped,
            num_skipped=self.progress.num_skipped,
            data_wait=data_wait,
            norms=result.norms,
            timing=timing.metrics() if timing is not None else {},
            experts=read_experts(self.model, result, self.dims.dp_group) if with_figures else None,
            depth=read_depth(self.model, result, self.dims.dp_group) if with_figures else None,
            memory_share=self._memory_share,
        )

    def validate(self) -> None:
        """Score the held-out text; the best score so far makes this checkpoint ``best``."""
        if not self.objective.can_score:
            return
        began = time.perf_counter()
        scores, best_by = self.score(), self.training.checkpoint.best_by
        figure = self.objective.best_by[best_by] * scores[best_by]
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
                num_tokens=scores.num_tokens,
                seconds=time.perf_counter() - began,
                is_best=is_best,
                figures=scores.figures,
            ),
        )
        self.boundary.is_best = is_best

    def finish(self) -> None:
        """Validate and save after the last step; a stopped run is only saved."""
        progress, step = self.progress, self.progress.step
        if step == 0:
            return
        if self.ending is not None and not self.ending.can_resume:
            if progress.last_validation < step:
                self.validate()
            self.saving.wait_for_outcome()  # a controller may ask for the best checkpoint
            self.ask_controllers("at_end")
            self.agree()
            self.apply_changes()
            if progress.step != step:
                self.validate()
                self.boundary.is_best = self.objective.can_score
            self.evaluations.run(self.progress, is_last=True)
        if self.boundary.is_best or self.boundary.save or progress.last_checkpoint < progress.step:
            self.save()
        if self.watchdog is not None:
            self.watchdog.stop()  # writing may wait for the disk
        self.saving.wait_until_written()

    def _feed_watchdog(self, factor: float) -> None:
        if self.watchdog is not None:
            self.watchdog.feed(factor)

    def score(self) -> Scores:
        """Score the objective's validation data."""
        self._feed_watchdog(FIRST_STEP_FACTOR)
        return self.scorer.score()

    def _end_if_over(self) -> None:
        if self.boundary.ending is None:
            self.boundary.ending = self.length.ending(self.progress, self.clock.elapsed_s)

    def settle_length(self) -> None:
        """Correct a length in minutes by the measured pace."""
        if self.boundary.ending is not None:
            return
        seconds = self.scorer.estimated_s, self.evaluations.seconds_a_step
        record = self.length.settle(self.progress, self.clock, *seconds)
        if record is not None:
            self.notify("on_change", record)
            self.notify("on_budget", record.after)

    # -- changes -------------------------------------------------------------------------------

    def ask_controllers(self, method: str, *details: Any) -> None:
        """Let each controller request changes; one that fails is reported and keeps running."""
        for controller in self.controllers:
            try:
                getattr(controller, method)(*details, self.control)
            except Exception as error:
                self._report_failure(f"{type(controller).__name__}.{method}", error)

    def apply_changes(self) -> None:
        """Apply the requests of ``control``, and report each change."""
        for change, reason, decision in self.control.take():
            self.snapshots.states.before_writing()
            self.boundary.reason = reason
            try:
                effect = change.apply(self.parts)
            except UltrathinkError as error:  # an impossible change, such as invalid weights
                self._report_failure(f"the change of {change.setting} ({reason})", error)
                continue
            if effect is not None:
                step = self.progress.step  # after a rollback, so that a resume keeps the record
                what = (step, change.setting, *effect, reason, decision)
                self.notify("on_change", ChangeRecord(*what, change=change))

    def agree(self) -> None:
        """Exchange requests between processes, and use the clock of the first."""
        if self.world.size == 1:
            return
        clock = self.clock
        mine = (clock.elapsed_s, clock.steps_s) if self.world.is_main else (0.0, 0.0)
        own = (self.control.num_waiting, self.saving.is_idle)
        shares = [0.0] * self.world.size
        shares[self.world.rank] = memory_share()
        sums = self.world.sums([*mine, *own, *shares])
        clock.agreed_s, clock.steps_s, waiting, num_idle, *shares = sums
        self._memory_share = max(shares)
        self._all_have_written = num_idle == self.world.size
        if waiting:
            everyones = self.world.gathered(self.control.take_json())
            self.control.agree_on([request for requests in everyones for request in requests])

    def notify(self, event: str, *details: Any) -> None:
        """Pass an event to every callback; one that fails is reported once."""
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

    def _report(self, text: str, level: Level) -> None:
        self.notify("on_message", text, level)

    def _renew_lock(self) -> None:
        if self.lock is not None:
            self.lock.renew()  # the lock vanished with the folder

    # -- saving --------------------------------------------------------------------------------

    def save_if_due(self) -> None:
        """Save at the end of this step boundary, so that the checkpoint includes all of it."""
        wanted = self.saving.is_due(self.progress, self.clock.elapsed_s)
        wanted = wanted or self.boundary.is_best or self.boundary.save
        if wanted and self.boundary.ending is None:  # the end saves after its validation
            self.save()
        if self._all_have_written:
            self.saving.collect()

    def save(self) -> None:
        """Write a checkpoint of this step while training continues."""
        self.progress.last_checkpoint = self.progress.step
        self.progress.last_checkpoint_s = self.clock.elapsed_s
        self.saving.save(
            self.progress.step,
            self.state_dict(),
            is_best=self.boundary.is_best,
            embedded=sorted(self.snapshots.embedded),
        )
        self.boundary.is_best = self.boundary.save = False
        self._all_have_written = self.world.size == 1

    def state_dict(self) -> State:
        """The whole state of a run: with the same files it continues bit for bit from here."""
        return self.state.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Continue from what ``state_dict`` returned."""
        self.state.load_state_dict({k: v for k, v in state.items() if k != SNAPSHOTS})


def _keep_own(_: object) -> None:
    """For states that are written into checkpoints but not read from them."""
