"""What the tests of the trainer watch runs with, and how they steer them."""

import json
from collections.abc import Callable, Iterable
from typing import Any

import torch
from safetensors.torch import load_file

from ultrathink.runs.folder import RunFolder
from ultrathink.training.callbacks import Callback, Controller, StepReport, ValidationReport
from ultrathink.training.change import Change
from ultrathink.training.changes import Rollback
from ultrathink.training.control import TrainerControl
from ultrathink.training.records import ChangeRecord
from ultrathink.training.snapshots import Snapshot
from ultrathink.training.trainer import Trainer


class Recorder(Callback):
    def __init__(self) -> None:
        self.steps: list[StepReport] = []
        self.validations: list[ValidationReport] = []
        self.changes: list[ChangeRecord] = []
        self.messages: list[str] = []

    def on_step(self, report: StepReport) -> None:
        self.steps.append(report)

    def on_validation(self, report: ValidationReport) -> None:
        self.validations.append(report)

    def on_change(self, change: ChangeRecord) -> None:
        self.changes.append(change)

    def on_message(self, text: str, level: str) -> None:
        self.messages.append(text)


class At(Controller):
    """Runs ``actions[step]`` at the boundary after that step."""

    def __init__(self, **actions: Any) -> None:
        self.actions = {int(name.removeprefix("step")): action for name, action in actions.items()}

    def at_boundary(self, report: StepReport, control: TrainerControl) -> None:
        if report.step in self.actions:
            self.actions[report.step](control)


def asks(*changes: Change) -> Callable[[TrainerControl], None]:
    """An action that asks for ``changes``."""

    def ask(control: TrainerControl) -> None:
        for change in changes:
            control.request(change, reason="test")

    return ask


def goes_back(*, kept: int, at: int, times: int = 1) -> At:
    """Keeps a snapshot after step ``kept``, and goes back to it after step ``at``, so often."""
    held: list[Snapshot] = []
    left = [None] * times

    def keep(control: TrainerControl) -> None:
        if not held:
            held.append(control.snapshot())

    def go_back(control: TrainerControl) -> None:
        if left:
            left.pop()
            control.request(Rollback(held[0], skip_data=False), reason="test")

    return At(**{f"step{kept}": keep, f"step{at}": go_back})


def records(run: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def without_time(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    dropped = ("time", "tokens_per_sec", "mfu", "memory_gib", "data_wait")
    return [{k: v for k, v in row.items() if k not in dropped} for row in rows]


def final_state(run: RunFolder) -> dict[str, torch.Tensor]:
    files = run.checkpoint("last").glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_equal_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same bits under the same names."""
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def scale_loss(trainer: Trainer, steps: Iterable[int], factor: float) -> None:
    """Multiply the loss of some steps, as a fault in it would; each once."""
    losses, to_come = trainer.objective.sums, set(steps)

    def faulty(*inputs: Any) -> Any:
        sums, step = losses(*inputs), trainer.progress.step + 1
        if step not in to_come:
            return sums
        to_come.remove(step)
        return sums._replace(loss=sums.loss * factor)

    trainer.objective.sums = faulty
