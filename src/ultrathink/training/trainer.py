"""The training loop, and what a run remembers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ultrathink.config.training import TrainingConfig
from ultrathink.core.divisors import largest_divisor
from ultrathink.core.errors import UltrathinkError
from ultrathink.core.protocols import State
from ultrathink.core.random import seed_everything, step_seed
from ultrathink.data.loader import TrainLoader
from ultrathink.data.validation import ValidationSet
from ultrathink.model.transformer import Transformer
from ultrathink.monitoring.records import Level, RunInfo
from ultrathink.parallel.mesh import ONE_PROCESS, ParallelDims
from ultrathink.parallel.timing import StepTimes
from ultrathink.parallel.watchdog import FIRST_STEP_FACTOR, Watchdog
from ultrathink.parallel.world import ALONE, World, is_lost_connection
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.lock import RunLock
from ultrathink.training.budget import Budget, Done, resolve_budget
from ultrathink.training.callbacks import (
    Callback,
    Controller,
    StepReport,
    ValidationReport,
    is_logged,
)
from ultrathink.training.changes import apply_change
from ultrathink.training.control import ControlQueue, LiveSettings
from ultrathink.training.endings import Ending
from ultrathink.training.experts import read_experts
from ultrathink.training.host_states import HostStates, copied_to_host
from ultrathink.training.length import measure_speed, settle_length
from ultrathink.training.memory import memory_share
from ultrathink.training.out_of_memory import heed_last_start, score_that_fits, take_smaller
from ultrathink.training.run_state import Progress, load_guard_state, load_run_state, run_state
from ultrathink.training.saving import Saving
from ultrathink.training.schedules import Factor, continued_schedule
from ultrathink.training.stepping import Stepper, UpdateGuard
from ultrathink.training.validation import Scores


@dataclass
class Trainer:
    """Trains ``model`` from ``loader`` into ``run``; made by ``ultrathink.build_trainer``.

    ``fit`` is the loop. ``control`` is how a run is changed from outside; every change waits for
    the step boundary.
    """

    model: Transformer
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
    world: World = ALONE
    dims: ParallelDims = ONE_PROCESS
    watchdog: Watchdog | None = None

    def __post_init__(self) -> None:
        self.control = ControlQueue(lambda: self.progress.step)
        self.snapshots = HostStates()
        for optimizer in self.stepper.optimizers:
            optimizer.register_step_pre_hook(self.snapshots.before_writing)
        self.carried: set[int] = set()  # keys of those that checkpoints hold too
        self.saving = Saving(
            self.run,
            self.training.checkpoint,
            on_written=lambda step, path: self.notify("on_checkpoint", step, path),
            on_restored=self._renew_lock,
            tell=lambda text, level: self.notify("on_message", text, level),
            world=self.world,
            snapshots=self.snapshots,
        )
        self.ending: Ending | None = None
        self.is_best = False  # this step's weights have the best score so far
        self.save_wanted = False
        self.expert_load: Tensor | None = None  # [L, E] of the last step: this process's tokens
        self._schedule: Factor | None = None
        self._clock: float | None = None
        self._agreed_s: float | None = None  # by the first process's clock, at a step boundary
        self._all_have_written = True  # the last checkpoint, as far as all processes know
        self._failures: set[str] = set()
        self._memory_share = 0.0  # of several processes, the fullest
        self.guard_state: Any = None  # of a checkpoint whose guard is not here, or not yet
        self.stepper.on_smaller = partial(take_smaller, self)
        self.eval_batch_size = self.training.eval.batch_size  # less once memory has not sufficed
        self._times = StepTimes(self.world, self.stepper.clock)
        self.paced: tuple[int, float] = (0, 0.0)  # steps since the start, and their seconds

    # -- the loop ------------------------------------------------------------------------------

    def fit(self) -> Ending:
        """Train to the end of the budget, or until a controller or a signal asks to stop."""
        try:
            self.start()
            while self.ending is None:
                report = self.train_step()
                self.notify("on_step", report)
                if self._is_due(self.settings.eval_every):
                    self.validate()
                self.ask_controllers(report)
                self.agree()
                self.apply_changes()
                settle_length(self)
                self._end_if_over()
                self.save_if_due()
            self.finish()
        except BaseException as error:
            # Asked twice to stop: at once. And what is written with one that is gone never ends.
            if isinstance(error, KeyboardInterrupt) or is_lost_connection(error):
                self.saving.abandon()
            raise
        finally:
            self.close()
        return self.ending

    def close(self) -> None:
        """Stop what works beside the loop and give the run folder free."""
        self.progress.elapsed_s, self._clock = self.elapsed_s(), None
        if self.watchdog is not None:
            self.watchdog.stop()
        self.saving.close()
        self.loader.close()
        self.notify("on_end", self.ending)
        if self.lock is not None:
            self.lock.release()

    def start(self) -> None:
        """Announce the run and fix its length in steps."""
        self._feed_watchdog(FIRST_STEP_FACTOR)
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
        heed_last_start(self)
        if self.budget is None:
            self.budget = resolve_budget(
                self.training,
                tokens_per_step=self.tokens_per_step,
                samples_per_epoch=self.loader.num_samples,
                measure_speed=lambda: measure_speed(self),
                done=Done(self.progress.step, self.progress.tokens, self.loader.samples_seen),
            )
        self.set_budget(self.budget)
        self.stepper.allocate_state()
        self.notify("on_budget", self.budget.total_steps)
        self.agree()
        self._end_if_over()

    def set_guard(self, guard: UpdateGuard) -> None:
        """Ask ``guard`` before each update, from where the loaded checkpoint left it.

        On several processes each has one of its own.
        """
        self.stepper.guard = guard
        load_guard_state(self, self.guard_state)

    def set_budget(self, budget: Budget) -> None:
        """Let the run, and the schedule of its learning rate, be so long from here on."""
        self.budget = budget
        self._schedule = continued_schedule(self.training.schedule, budget, self.settings)

    def train_step(self) -> StepReport:
        """Take the next batch and learn from it."""
        assert self._schedule is not None
        began, self._agreed_s = time.perf_counter(), None
        self._feed_watchdog(1 if self.paced[0] else FIRST_STEP_FACTOR)
        if self.world.size > 1:  # each with random numbers of its own, whatever came before
            rank = self.dims.dp_group.rank
            seed_everything(step_seed(self.loader.seed, self.progress.step, rank))
        batch = self.loader.next_batch()
        data_wait = time.perf_counter() - began
        for note in self.loader.take_notes():
            self.notify("on_message", note, "warning")
        lr_factor = self._schedule(self.progress.step + 1)
        lr_factor *= self.settings.lr_factor_at(self.progress.step + 1) * self.settings.lr_scale
        if self.model.routing is not None:
            self.model.routing.warm_up(self.progress.step + 1)
        is_told = self._is_logged(self.progress.step + 1)
        corrected = lr_factor * self.settings.lr_correction
        result = self.stepper.take_step(batch, self.settings, corrected, with_norms=is_told)
        self.expert_load = result.stats.get("expert_load")
        self.progress.step += 1
        self.progress.tokens += self.tokens_per_step
        self.progress.num_skipped += result.skipped
        seconds = time.perf_counter() - began
        self.paced = (self.paced[0] + 1, self.paced[1] + seconds)
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
            lr=self.stepper.learning_rate(),
            scheduled_lr=self.training.optimizer.lr * lr_factor,
            num_tokens=result.num_tokens,
            tokens=self.progress.tokens,
            seconds=seconds,
            skipped=result.skipped,
            num_skipped=self.progress.num_skipped,
            data_wait=data_wait,
            norms=result.norms,
            timing=self._compare_times(seconds),
            experts=read_experts(self.model, result, self.dims.dp_group) if is_told else None,
            memory_share=self._memory_share,
        )

    def _is_logged(self, step: int) -> bool:
        total_steps = self.budget.total_steps if self.budget is not None else 0
        return is_logged(step, self.training.log_every, total_steps)

    def _compare_times(self, seconds: float) -> dict[str, float]:
        """What of a step's time went where on all processes, now and then."""
        if self.world.size == 1:
            return {}
        self._times.add(seconds)
        if self.progress.step != 1 and not self._is_due(self.training.log_every):
            return {}
        timing = self._times.compare()
        if self.progress.step > 1:  # the first step compiles, each process at its own pace
            for sentence in self._times.new_stragglers(timing):
                self.notify("on_message", sentence, "warning")
        return timing.metrics()

    def validate(self) -> None:
        """Score the held-out text; a best score makes this step's checkpoint the ``best``."""
        if self.held_out is None:
            return
        self._feed_watchdog(FIRST_STEP_FACTOR)
        began = time.perf_counter()
        scores = self.score(self.held_out)
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
        is_over = self.ending is not None and not self.ending.can_resume
        if is_over and progress.last_validation < progress.step:
            self.validate()
        if self.is_best or self.save_wanted or progress.last_checkpoint < progress.step:
            self.save()
        if self.watchdog is not None:
            self.watchdog.stop()  # a disk may be waited for
        self.saving.wait_until_written()

    def _feed_watchdog(self, factor: float) -> None:
        if self.watchdog is not None:
            self.watchdog.feed(factor)

    def score(self, held_out: ValidationSet, max_batches: int | None = None) -> Scores:
        """Score the model on held-out text, or on its first batches."""
        return score_that_fits(self, held_out, max_batches)

    def _end_if_over(self) -> None:
        assert self.budget is not None
        if self.ending is None:
            self.ending = self.budget.ending(
                self.progress.step, self.elapsed_s(), self.training.max_minutes
            )

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
        for request in self.control.take():
            try:
                change = apply_change(self, request)
            except UltrathinkError as error:  # a request that cannot be met, such as odd weights
                self._report_failure(f"the change of {request.setting} ({request.reason})", error)
            else:
                if change is not None:
                    self.notify("on_change", change)

    def agree(self) -> None:
        """Let all processes hear every request, and decide by the clock of the first."""
        if self.world.size == 1:
            return
        num_steps, seconds = self.paced
        mine = (self.elapsed_s(), seconds) if self.world.is_main else (0.0, 0.0)
        own = (self.control.num_waiting, self.saving.is_idle)
        shares = [0.0] * self.world.size
        shares[self.world.rank] = memory_share()
        sums = self.world.sums([*mine, *own, *shares])
        self._agreed_s, seconds, waiting, num_idle, *shares = sums
        self._memory_share = max(shares)
        self.paced = (num_steps, seconds)
        self._all_have_written = num_idle == self.world.size
        if waiting:
            everyones = self.world.gathered(self.control.take())
            self.control.put([request for requests in everyones for request in requests])

    def copied_state(self) -> State:
        """A copy of the whole state in the memory of the host, made at once."""
        state: State = copied_to_host(self.state_dict())
        return state

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
        if self._all_have_written:
            self.saving.collect()

    def save(self) -> None:
        """Have a checkpoint of this step written; training goes on meanwhile."""
        self.progress.last_checkpoint = self.progress.step
        self.progress.last_checkpoint_s = self.elapsed_s()
        self.saving.save(
            self.progress.step,
            self.state_dict(),
            is_best=self.is_best,
            carried=sorted(self.carried),
        )
        self.is_best = self.save_wanted = False
        self._all_have_written = self.world.size == 1

    def state_dict(self) -> State:
        """All that a run remembers; with the same files it goes on bit for bit from here."""
        self.progress.elapsed_s = self.elapsed_s()
        return run_state(self)

    def load_state_dict(self, state: State) -> None:
        """Go back to what ``state_dict`` returned."""
        load_run_state(self, state)

    def fit_micro_batch(self) -> None:
        """Let micro-batches divide this process's share of the batch, however many there were."""
        share = self.dims.share(self.training.batch_size)
        size = self.settings.micro_batch_size
        self.settings.micro_batch_size = largest_divisor(share, size)

    def elapsed_s(self) -> float:
        """Seconds of training so far, over all its sessions, compilation included.

        From ``agree`` to the next step it is the same moment for all processes.
        """
        if self._agreed_s is not None:
            return self._agreed_s
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
