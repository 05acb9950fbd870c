"""What a checkpoint costs the training beside which it is written.

    python benchmarks/checkpoint_stall.py --shape S
    python benchmarks/checkpoint_stall.py --shape M --json
    python benchmarks/checkpoint_stall.py --shape S --steered   # with snapshots in the checkpoint

The real trainer is asked for a checkpoint every so many steps. The stall is what the steps from its
copy to its last byte took beyond the median of the steps before: the copy, and whatever the writing
takes from the cores. It is compared with the time from the request to the last byte; what the copy
alone takes, and the writing while nothing trains, stands beside it.

With ``--steered`` the run keeps snapshots to go back to, and its checkpoints carry them. One is
taken every other step, so that most of them are new at each checkpoint: the worst case.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contenders import config_of
from harness import parser, rows, setting, show, spread, start
from train_speed import SHAPES

from ultrathink import build_trainer
from ultrathink.checkpoint.format import save_checkpoint
from ultrathink.training.callbacks import Callback, Controller, StepReport
from ultrathink.training.changes import SaveCheckpoint, Stop
from ultrathink.training.control import TrainerControl
from ultrathink.training.saving import private_copy
from ultrathink.training.trainer import Trainer

QUIET_STEPS = 8  # between checkpoints, none of them disturbed


@dataclass
class Timed(Controller, Callback):
    """Asks for checkpoints and notes when each step ended."""

    checkpoints: int
    trainer: Trainer | None = None
    stalls_s: list[float] = field(default_factory=list)
    write_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    written_mb: list[float] = field(default_factory=list)
    in_all_mb: list[float] = field(default_factory=list)
    _quiet: list[float] = field(default_factory=list)
    _disturbed: list[float] = field(default_factory=list)
    _is_writing: bool = False
    _last: float = 0.0
    _asked: float = 0.0

    def at_boundary(self, report: StepReport, control: TrainerControl) -> None:
        now = time.perf_counter()
        taken, self._last = now - self._last, now
        if report.step <= 5:  # compilation, fresh memory
            return
        (self._disturbed if self._is_writing else self._quiet).append(taken)
        if len(self._quiet) > QUIET_STEPS and not self._is_writing:
            if len(self.stalls_s) == self.checkpoints:
                control.request(Stop(), reason="enough")
            else:
                control.request(SaveCheckpoint(), reason="benchmark")
                self._is_writing, self._asked = True, now

    def on_checkpoint(self, step: int, path: Path) -> None:
        if not self._is_writing:
            return
        # It is reported at the boundary after the step that it was written in, which counts too.
        self.write_s.append(time.perf_counter() - self._asked)
        files = [file.stat() for file in path.rglob("*") if file.is_file()]
        self.in_all_mb.append(sum(file.st_size for file in files) / 1e6)
        # What an earlier checkpoint holds has two names by now.
        self.written_mb.append(sum(f.st_size for f in files if f.st_nlink == 1) / 1e6)
        normal = statistics.median(self._quiet)
        self.stalls_s.append(sum(self._disturbed) - normal * len(self._disturbed))
        self.step_s.append(normal)
        self._quiet, self._disturbed, self._is_writing = [], [], False


def main() -> None:
    """Train, save, and print what the saving cost."""
    options = parser(__doc__)
    options.add_argument("--shape", choices=SHAPES, default="S")
    options.add_argument("--device", default="cpu")
    options.add_argument("--checkpoints", type=int, default=20)
    options.add_argument("--threads", type=int, default=os.cpu_count())
    options.add_argument("--steered", action="store_true", help="with snapshots to go back to")
    options.add_argument("--folder", help="where to write; a temporary folder by default")
    args = options.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        steered = ["orchestrator.mode=act", "orchestrator.snapshots.every_steps=2"]
        config = config_of(
            {**SHAPES[args.shape], "device": args.device},
            folder,
            *(steered if args.steered else []),
        )
        timed = Timed(args.checkpoints)
        trainer = build_trainer(config, controllers=[timed], callbacks=[timed])
        trainer.fit()
        alone = write_alone(trainer, Path(folder) / "alone", times=9)
    stall, write = statistics.median(timed.stalls_s), statistics.median(timed.write_s)
    result = {
        "benchmark": "checkpoint_stall",
        "shape": args.shape,
        "setting": setting(),
        "step_s": statistics.median(timed.step_s),
        "stall_s": spread(timed.stalls_s),
        "copy_s": spread(alone["copy_s"]),
        "write_s": spread(timed.write_s),
        "write_alone_s": spread(alone["write_s"]),
        "megabytes": alone["megabytes"],
        "megabytes_with_snapshots": statistics.median(timed.in_all_mb),
        "megabytes_written": statistics.median(timed.written_mb),
        "stall_share": stall / write,
    }
    show(result, describe(result), args.json)


def write_alone(trainer: Trainer, folder: Path, times: int) -> dict[str, Any]:
    """Seconds that the trainer's checkpoint takes to copy and to write with nothing beside it."""
    copying, writing = [], []
    for _ in range(times):
        began = time.perf_counter()
        state = private_copy(trainer.state_dict())
        copied = time.perf_counter()
        save_checkpoint(folder, state)
        copying.append(copied - began)
        writing.append(time.perf_counter() - copied)
    size = sum(file.stat().st_size for file in folder.iterdir())
    return {"copy_s": copying, "write_s": writing, "megabytes": size / 1e6}


def describe(result: dict[str, Any]) -> str:
    """The result as a table, in milliseconds."""
    lines = [
        (name, *(f"{1000 * figures[key]:,.0f}" for key in ("median", "low", "high")))
        for name, figures in (
            ("stall of a checkpoint, ms", result["stall_s"]),
            ("its copy alone, ms", result["copy_s"]),
            ("written beside training, ms", result["write_s"]),
            ("written alone, ms", result["write_alone_s"]),
        )
    ]
    return (
        f"shape {result['shape']}: a step {1000 * result['step_s']:,.0f} ms, a checkpoint "
        f"{result['megabytes']:,.1f} MB, {result['megabytes_with_snapshots']:,.1f} with what it "
        f"carries, of which {result['megabytes_written']:,.1f} were written\n"
        f"{rows(('', 'median', 'low', 'high'), lines)}\n"
        f"training stalls {result['stall_share']:.1%} of the time that writing takes"
    )


if __name__ == "__main__":
    start(main)
