"""Smaller micro-batches for want of memory: put on record, and handed on to the next start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ultrathink.core.divisors import largest_divisor
from ultrathink.parallel.world import World
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.shortage import Shortage, read_shortage, write_shortage
from ultrathink.training.out_of_memory import Fit
from ultrathink.training.records import ChangeRecord
from ultrathink.training.run_state import Progress
from ultrathink.training.settings import LiveSettings


@dataclass(frozen=True)
class Shortages:
    """What a run does about memory that did not suffice, beside the step itself.

    ``share`` is how many sequences of a batch this process has; ``report`` gets each record.
    """

    run: RunFolder
    world: World
    settings: LiveSettings
    progress: Progress
    share: int
    report: Callable[[ChangeRecord], None]

    def went_on(self, before: int, fit: Fit) -> None:
        """Record that the run goes on in smaller micro-batches; of several processes, will."""
        step = self.progress.step + 1
        if self.world.size > 1:
            found = Shortage(step, self.world.rank, before, fit.size, fit.problem)
            write_shortage(self.run, found)
        else:
            self._record(before, fit.size, f"step {step} ran out of memory: {fit.problem}")

    def take_last(self) -> None:
        """Take the micro-batch that the last start asks for, where no checkpoint knows of it."""
        found = read_shortage(self.run) if self.world.is_main else None
        values = self.world.from_main(found.to_dict() if found is not None else None)
        if values is None or self.progress.step >= values["step"]:
            return
        last, before = Shortage(**values), self.settings.micro_batch_size
        after = largest_divisor(self.share, last.after)
        if after < before:
            self.settings.micro_batch_size = after
            where = f"step {last.step} ran out of memory on process {last.rank}"
            self._record(before, after, f"{where}: {last.problem}")

    def _record(self, before: int, after: int, reason: str) -> None:
        step, rule = self.progress.step, "out_of_memory"
        self.report(ChangeRecord(step, "micro_batch_size", before, after, reason, rule=rule))
