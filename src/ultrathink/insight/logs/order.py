"""Steps that go backwards: a resume, a late validation, or the same step told in two lines."""

from __future__ import annotations

from dataclasses import replace

from ultrathink.insight.logs.log import LogSignals


class StepOrder:
    """Says of each record whether steps were undone before it.

    Training lines are one series, validation lines another, all others a third: a series that goes
    back was resumed. A line that is merely behind those of other series is late, and is taken as
    of the last step. A step's own validation may follow it, or come before.
    """

    def __init__(self) -> None:
        self._last: dict[str, int] = {}

    def take(self, signals: LogSignals) -> tuple[int | None, LogSignals]:
        """The step beyond which all was undone (None where nothing was), and the record."""
        kind, step = _kind(signals), signals.step
        last = self._last.get(kind)
        undone = None
        if last is not None and (step < last or (step == last and kind != "other")):
            undone = step - 1
            self._last = {known: min(at, undone) for known, at in self._last.items()}
        newest = max(self._last.values(), default=step)
        self._last[kind] = step
        return undone, replace(signals, step=max(step, newest))


def _kind(signals: LogSignals) -> str:
    for kind in ("loss", "val_loss"):
        if any(name == kind or name.startswith(f"{kind}/") for name in signals.values):
            return kind
    return "other"
