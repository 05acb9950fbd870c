"""Records smaller micro-batches after a run ran out of memory, and applies them on a restart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ultrathink.core.divisors import largest_divisor
from ultrathink.parallel.world import World
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.out_of_memory import OutOfMemory, read_out_of_memory, write_out_of_memory
from ultrathink.training.out_of_memory import Fit
from ultrathink.training.records import ChangeRecord
from ultrathink.training.run_state import Progress
from ultrathink.training.settings import LiveSettings


@dataclass(frozen=True)
class OutOfMemoryLog:
    """Records each reduction of the micro-batch for want of memory.

    ``share`` is the number of sequences of a batch on this process; ``report`` gets each record.
    """

    run: RunFolder
    world: World
    settings: LiveSettings
    progress: Progress
    share: int
    report: Callable[[ChangeRecord], None]

    def on_smaller(self, before: int, fit: Fit) -> None:
        """Record the reduction from ``before`` to ``fit``: for the restart if there are several
        processes, else as a change of this run."""
        step = self.progress.step + 1
        if self.world.size > 1:
            record = OutOfMemory(step, self.world.rank, before, fit.size, fit.problem)
            write_out_of_memory(self.run, record)
        else:
            self._report(before, fit.size, f"step {step} ran out of memory: {fit.problem}")

    def apply_last(self) -> None:
        """Apply the reduction that the last start recorded, unless a checkpoint includes it."""
        found = read_out_of_memory(self.run) if self.world.is_main else None
        values = self.world.from_main(found.to_dict() if found is not None else None)
        if values is None or self.progress.step >= values["step"]:
            return
        last, before = OutOfMemory(**values), self.settings.micro_batch_size
        after = largest_divisor(self.share, last.after)
        if after < before:
            self.settings.micro_batch_size = after
            where = f"step {last.step} ran out of memory on process {last.rank}"
            self._report(before, after, f"{where}: {last.problem}")

    def _report(self, before: int, after: int, reason: str) -> None:
        step, rule = self.progress.step, "out_of_memory"
        self.report(ChangeRecord(step, "micro_batch_size", before, after, reason, rule=rule))
