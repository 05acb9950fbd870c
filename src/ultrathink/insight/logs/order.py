"""Steps that do not go forward: a resume, a second run, a late validation, several writers."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from ultrathink.insight.logs.log import LogError

# Of the last 8 losses, 3 at different steps that are not beyond the step before: a resume goes back
# once, two processes that write to one log do at every step.
_WINDOW, _MOST = 8, 3

WRITERS = (
    "has the lines of several processes or runs in turn and nothing to distinguish them by, or "
    "rows that are not sorted. Keep the lines of one, or name the column that says which run a "
    "row is of: --columns run=COLUMN."
)


class StepOrder:
    """Finds the run and the step of each record of a log.

    Training lines are one series, validation lines another, all others a third. A series that goes
    back was resumed; where it goes back to the first step, another run begins, unless
    ``is_one_run``. A line that is merely behind those of other series is late, and belongs to the
    last step. A step's own validation may follow it, or come before.
    """

    def __init__(self, *, is_one_run: bool = False) -> None:
        self.run = 1
        self.undone: int | None = None  # the step beyond which the last record undid all
        self._is_one_run = is_one_run
        self._first: int | None = None
        self._last: dict[str, tuple[int, str]] = {}  # step and losses, by series
        self._backs: dict[str, deque[int | None]] = {}

    @property
    def newest(self) -> int:
        """The last step of all series; 0 before the first."""
        return max((step for step, _ in self._last.values()), default=0)

    def take(self, step: int, values: Mapping[str, float]) -> int | None:
        """The step of a record; None where it was printed twice. LogError for several writers."""
        kind = kind_of(values)
        losses = repr({name: value for name, value in values.items() if "loss" in name})
        last, text = self._last.get(kind, (step - 1, ""))
        if kind != "other" and (last, text) == (step, losses):
            return None
        is_back = step < last or (step == last and kind != "other")
        self.undone = step - 1 if is_back else None
        self._first = step if self._first is None else self._first
        if (
            step <= self._first < (last if kind == "other" else self.newest)
            and not self._is_one_run
        ):
            self.run, self._first, self._last, self.undone = self.run + 1, step, {}, None
            is_back = True
        if kind != "other":
            self._check(kind, step if is_back else None)
        if self.undone is not None:
            undone = self.undone
            self._last = {name: (min(at, undone), text) for name, (at, text) in self._last.items()}
        shown = max(step, self.newest) if self._last else step
        self._last[kind] = step, losses
        return shown

    def _check(self, kind: str, back: int | None) -> None:
        backs = self._backs.setdefault(kind, deque(maxlen=_WINDOW))
        backs.append(back)
        steps = sorted({step for step in backs if step is not None})
        if len(steps) >= _MOST:
            raise LogError(
                f"the log {WRITERS} Steps with several values of {kind}: "
                f"{', '.join(map(str, steps))}."
            )


def kind_of(values: Mapping[str, float]) -> str:
    """The series that a record belongs to: ``loss``, ``val_loss`` or ``other``."""
    for kind in ("loss", "val_loss"):
        if any(name == kind or name.startswith(f"{kind}/") for name in values):
            return kind
    return "other"
