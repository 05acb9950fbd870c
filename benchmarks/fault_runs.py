"""One run of the benchmark, in a separate process: train, record signals, score."""

from __future__ import annotations

import json
import math
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what an optimizer imports; here, so that all runs share it
from fault_injection import Injection
from fault_parts import controller_of, fault_of
from fault_setting import Job, Setting

from ultrathink import build_trainer, load_config
from ultrathink.core.files import write_atomic
from ultrathink.recipes.resume import resume_trainer
from ultrathink.runs.folder import RunFolder
from ultrathink.training.callbacks import (
    Callback,
    Controller,
    StepReport,
    ValidationReport,
)
from ultrathink.training.changes import Stop
from ultrathink.training.control import TrainerControl
from ultrathink.training.memory import memory_in_use
from ultrathink.training.records import ChangeRecord
from ultrathink.training.stepping import UpdateGuard, Verdict
from ultrathink.training.trainer import Trainer
from ultrathink.training.validation import evaluate

RESULT, SIGNALS = "result.json", "signals.jsonl"
STRONG = 0.5  # a clip that leaves less of the norm counts as an intervention
_NO_INTERVENTIONS = ("checkpoint",)  # changes that leave training as it is


def run_job(job: Job, setting: Setting, out: Path) -> None:
    """Do what ``job`` says and keep its result in its folder under ``out``."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # at once, and without a word
    torch.set_num_threads(1)
    folder = out / job.folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if job.kind == "snapshot":
        result = _make_snapshot(job, setting, folder)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            result = _train(job, setting, out, Path(scratch))
    write_atomic(folder / RESULT, json.dumps({**result, "sources": job.sources}))


class _StopAt(Controller):
    """Ends a run at a step, which is then saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def at_boundary(self, report: StepReport, control: TrainerControl) -> None:
        if report.step == self.step:
            control.request(Stop(), reason="the snapshot of the benchmark")


def _make_snapshot(job: Job, setting: Setting, folder: Path) -> dict[str, Any]:
    recorder = Recorder(folder / SIGNALS)
    config = load_config(
        "debug",
        [
            *setting.config(job.model, job.num_steps),
            f"run.dir={folder}",
            "run.name=run",
            f"run.seed={job.seed}",
        ],
    )
    trainer = build_trainer(
        config, callbacks=[recorder], controllers=[_StopAt(setting.snapshot_step)]
    )
    trainer.fit()
    return {"steps": trainer.progress.step}


def _train(job: Job, setting: Setting, out: Path, scratch: Path) -> dict[str, Any]:
    assert job.controller is not None
    steering = Steering(controller_of(Path(job.controller.file)))
    recorder = Recorder(out / job.folder / SIGNALS)
    parts: dict[str, Any] = {
        "callbacks": [recorder, steering.watcher],
        "controllers": steering.controllers,
    }
    if job.kind == "healthy":
        config = setting.config(job.model, job.num_steps)
        own = [f"run.dir={scratch}", f"run.seed={job.seed}", *steering.overrides]
        trainer = build_trainer(load_config("debug", [*config, *own]), **parts)
    else:
        snapshot = Job("snapshot", job.model, job.seed, job.num_steps)
        run = scratch / "run"
        shutil.copytree(out / snapshot.folder / "run", run, symlinks=True)
        trainer = resume_trainer(RunFolder(run), overrides=steering.overrides, **parts)
    fault = fault_of(Path(job.fault.file))() if job.fault is not None else None
    Injection(trainer, fault, begin=job.injection, seed=job.seed)
    steering.steer(trainer)
    died = None
    memory = memory_in_use()["memory"]
    try:
        trainer.fit()
    except Exception as error:
        died = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    memory = memory_in_use()["memory"] - memory
    if fault is not None:
        fault.end()
    return {
        "loss": score(trainer, setting) if died is None else None,
        "died": died,
        "step": trainer.progress.step,
        "steps_taken": recorder.num_steps,
        "seconds": recorder.seconds,
        "memory_growth_gib": memory,
        "skipped": trainer.progress.num_skipped,
        "interventions": steering.interventions,
    }


def score(trainer: Trainer, setting: Setting) -> float | None:
    """Mean loss on the fixed validation set, nats a token; None where it is not finite."""
    assert trainer.objective.held_out is not None
    scores = evaluate(
        trainer.model,
        trainer.objective.held_out,
        device=trainer.device,
        batch_size=16,
        max_tokens=setting.scored_tokens,
    )
    return scores.loss if math.isfinite(scores.loss) else None


class Steering:
    """A controller in its run: asked where it can be asked, and watched for when it intervenes.

    ``interventions`` are the steps that it left out, clipped to less than half their norm, or
    before which it changed something through ``TrainerControl``.
    """

    def __init__(self, factory: Callable[[], Any]) -> None:
        self.one = factory()
        self.overrides = tuple(getattr(factory, "overrides", ()))  # of the run's configuration
        self.controllers = [self.one] if hasattr(self.one, "at_boundary") else []
        self.interventions: list[int] = []
        self.watcher = _ChangeWatcher(self.interventions)

    def steer(self, trainer: Trainer) -> None:
        """Let the controller judge the updates of ``trainer``, if that is what it does; a guard
        that its configuration brought along is watched likewise."""
        guard = self.one if hasattr(self.one, "judge") else trainer.stepper.guard
        if guard is not None:
            trainer.set_guard(_WatchedGuard(guard, trainer, self.interventions))


class _WatchedGuard:
    """Passes on what a guard says, and keeps the steps in which that is an intervention."""

    def __init__(self, guard: UpdateGuard, trainer: Trainer, interventions: list[int]) -> None:
        self.guard = guard
        self.trainer = trainer
        self.interventions = interventions
        if hasattr(guard, "state_dict"):
            self.state_dict = guard.state_dict
            self.load_state_dict = guard.load_state_dict

    def judge(self, step_loss: float, grad_norm: float) -> Verdict:
        verdict = self.guard.judge(step_loss, grad_norm)
        bites = verdict.clip is not None and verdict.clip < STRONG * grad_norm
        if verdict.skip or bites:
            self.interventions.append(self.trainer.progress.step + 1)
        return verdict


class _ChangeWatcher(Callback):
    """Keeps the steps before which something was changed."""

    def __init__(self, interventions: list[int]) -> None:
        self.interventions = interventions
        self._step = 0  # the last that was taken: a rollback sets the run's own count back

    def on_step(self, report: StepReport) -> None:
        self._step = report.step

    def on_change(self, change: ChangeRecord) -> None:
        if change.setting not in _NO_INTERVENTIONS:
            self.interventions.append(self._step + 1)


class Recorder(Callback):
    """Writes the signals of each step as a line of JSON, under the names of ``Signals``."""

    def __init__(self, file: Path) -> None:
        self.num_steps = 0
        self.seconds = 0.0
        self._file = file
        self._line: dict[str, float] | None = None
        self._lines: list[str] = []

    def on_step(self, report: StepReport) -> None:
        self._finish_line()
        self.num_steps += 1
        self.seconds += report.seconds
        self._line = {
            "step": report.step,
            "loss": report.loss,
            "grad_norm": report.grad_norm,
            "lr": report.lr,
            "step_time": report.seconds,
            "tokens_per_sec": report.num_tokens / max(report.seconds, 1e-9),
            "data_wait": report.data_wait,
            "skipped_steps": report.num_skipped,
            **memory_in_use(),
            **report.norms,
            **(report.experts.summary() if report.experts is not None else {}),
        }

    def on_validation(self, report: ValidationReport) -> None:
        if self._line is not None:
            self._line["val_loss"] = report.loss

    def on_end(self, ending: Any) -> None:
        self._finish_line()
        self._file.write_text("".join(self._lines), encoding="utf-8")

    def _finish_line(self) -> None:
        if self._line is not None:
            self._lines.append(json.dumps(self._line) + "\n")
            self._line = None
