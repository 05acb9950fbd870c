"""Validation losses, losses of single sources, and accuracies: overfitting and forgetting."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ultrathink.orchestrator.detectors.base import Baseline, Detector, Rhythm
from ultrathink.orchestrator.events import Finding
from ultrathink.orchestrator.remembering import PerName
from ultrathink.orchestrator.signals import SMALL, Signals
from ultrathink.orchestrator.windows import Window, deviation, median

RISEN = 0.01  # of the best validation loss
MUCH_RISEN = 0.1
CLEAR_RISE = 4.0  # standard errors
UNSURE = 2.0  # the noise of n differences is multiplied by 1 + 2/n: it may be too small
WORSE_IN_A_ROW = 3  # validations
BEYOND_NOISE = (0.2, 2)  # rise, and number of validations in a row that show it
FORGOTTEN = (0.05, 6.0)  # rise of a source's loss above its best: share, standard errors
BLOCK = 16  # observed steps per median of a source's loss
DROP = (0.1, 6.0)  # of an accuracy: share of its level, standard deviations


class Overfitting(Detector):
    """Finds a validation loss that keeps rising while the training loss falls.

    The mean of the last validations must be clearly above the best one, given the noise of
    validations and that the best of many is low by chance.
    """

    remembered = (
        "_best",
        "_best_step",
        "_train_then",
        "_last",
        "_num_seen",
        "_num_worse",
        "_train",
        "_since",
    )

    def __init__(self) -> None:
        self._best: float | None = None
        self._best_step = 0
        self._train_then: float | None = None  # the training loss near the best validation
        self._last = Window(32)
        self._num_seen = 0
        self._num_worse = 0
        self._train = Window(32)
        self._since = Rhythm()

    def observe(self, signals: Signals) -> list[Finding]:
        self._since.step()
        train, loss = signals.finite("loss"), signals.finite("val_loss")
        if train is not None:
            self._train.add(train)
        if loss is None:
            return []
        pause = self._since.pause()
        self._last.add(loss)
        self._num_seen += 1
        now = self._train.median()
        if self._best is None or loss <= self._best:
            self._best, self._best_step = loss, signals.step
            self._train_then = None if math.isnan(now) else now
            self._num_worse = 0
            return []
        self._num_worse += 1
        if self._train_then is not None and now > self._train_then:
            return []
        last = self._last.values
        error = noise(last)
        sure = CLEAR_RISE / math.sqrt(WORSE_IN_A_ROW) + math.sqrt(2 * math.log(self._num_seen))
        rise = float(last[-min(WORSE_IN_A_ROW, self._num_worse) :].mean()) - self._best
        size = max(abs(self._best), SMALL)
        share = rise / size
        is_clear = (
            self._num_worse >= WORSE_IN_A_ROW and share >= RISEN and rise >= sure * error
        ) or (
            self._num_worse >= BEYOND_NOISE[1]
            and float(last[-BEYOND_NOISE[1] :].min()) - self._best > BEYOND_NOISE[0] * size
        )
        if not is_clear:
            return []
        severity = "high" if share > MUCH_RISEN else "medium"
        message = (
            f"the validation loss has risen to {loss:.4g} from its best of step "
            f"{self._best_step:,}, {self._best:.4g}, while the training loss fell"
        )
        figures = {"val_loss": loss, "best": self._best, "rise": rise, "noise": error}
        what = (signals.step, "overfitting", severity, message, figures)
        return [Finding(*what, since=self._best_step + 1, pause=pause)]

    def rewind(self, step: int) -> None:
        self._num_worse = 0


def noise(values: npt.NDArray[np.float64]) -> float:
    """The noise of validations, independent of their trend: from third differences."""
    bends = np.diff(values, 3)
    if len(bends) < 2:
        return math.inf
    return deviation(bends) / math.sqrt(20) * (1 + UNSURE / len(bends))


class Forgetting(Detector):
    """Finds a source whose loss rises far above its best while the loss of another falls."""

    remembered = ("_blocks", "_levels", "_errors", "_since")

    def __init__(self) -> None:
        self._blocks: dict[str, list[float]] = {}
        self._levels = PerName(lambda: Window(64))
        self._errors: dict[str, float] = {}
        self._since = PerName(Rhythm)

    def observe(self, signals: Signals) -> Iterator[Finding]:
        for rhythm in self._since.values():
            rhythm.step()
        for prefix, size in (("loss/", BLOCK), ("val_loss/", 1)):
            for source, loss in signals.having(prefix).items():
                if loss < 0:
                    continue
                block = self._blocks.setdefault(prefix + source, [])
                block.append(math.log(loss + SMALL))
                if len(block) >= size:
                    self._close(prefix + source)
                    yield from self._judge(signals.step, prefix, source)

    def rewind(self, step: int) -> None:
        self._blocks = {}

    def _close(self, name: str) -> None:
        levels = self._levels[name]
        levels.add(median(np.array(self._blocks.pop(name))))
        values = levels.values
        if len(values) >= 4:  # differences of neighbours, which hardly depend on a trend
            self._errors[name] = deviation(values[1:] - values[:-1]) / math.sqrt(2)

    def _judge(self, step: int, prefix: str, source: str) -> list[Finding]:
        pause = self._since[prefix + source].pause()
        values = self._levels[prefix + source].values
        if len(values) < 6:
            return []
        error = self._errors[prefix + source]
        rise = min(values[-1], values[-2]) - values[:-2].min() - 2 * error
        if rise < max(math.log1p(FORGOTTEN[0]), FORGOTTEN[1] * error):
            return []
        falling = [
            name.removeprefix(prefix)
            for name, window in self._levels.items()
            if name.startswith(prefix) and name != prefix + source
            if len(window) >= 6 and window.values[-2:].mean() < window.values[-6:-2].mean()
        ]
        if not falling:
            return []
        loss, best = (math.exp(value) - SMALL for value in (values[-1], values[:-2].min()))
        message = (
            f"the loss of {source} has risen to {loss:.4g} from its best of {best:.4g}, "
            f"while that of {falling[0]} falls"
        )
        figures = {"loss": loss, "best": best, "rise": float(rise), "noise": error}
        return [Finding(step, "forgetting", "medium", message, figures, None, source, pause)]


class AccuracyDrop(Detector):
    """Finds an accuracy that falls far below its level and stays there for a second step."""

    remembered = ("_baselines", "_num_low", "_since")

    NAMES = ("accuracy", "val_accuracy")

    def __init__(self) -> None:
        self._baselines = {name: Baseline(level=16, spread=64, floor=0.002) for name in self.NAMES}
        self._num_low = dict.fromkeys(self.NAMES, 0)
        self._since = {name: Rhythm() for name in self.NAMES}

    def observe(self, signals: Signals) -> Iterator[Finding]:
        for name, baseline in self._baselines.items():
            self._since[name].step()
            value = signals.finite(name)
            if value is None:
                continue
            pause = self._since[name].pause()
            if len(baseline) < 8:
                baseline.add(-value, signals.step)  # a baseline finds rising values
                continue
            level = -baseline.level
            is_low = baseline.score(-value) > DROP[1] and level - value > DROP[0] * abs(level)
            self._num_low[name] = self._num_low[name] + 1 if is_low else 0
            if not is_low:
                baseline.add(-value, signals.step)
            elif self._num_low[name] > 1:
                message = f"the {name.replace('_', ' ')} fell to {value:.3g} from about {level:.3g}"
                figures = {"accuracy": value, "level": level, "score": baseline.score(-value)}
                what = (signals.step, "accuracy_drop", "medium", message, figures)
                yield Finding(*what, subject=name, pause=pause)
            if self._num_low[name] >= 24:
                baseline.restart()
                self._num_low[name] = 0

    def rewind(self, step: int) -> None:
        self._num_low = dict.fromkeys(self.NAMES, 0)
        for baseline in self._baselines.values():
            baseline.rewind(step)
