"""The training loss: hard batches, lasting spikes, divergence, NaN and infinite values.

Losses are judged by their logarithms, because noise is proportional to size, unless one was
negative. A jump is judged after the next steps: if the loss is back at its level, it was a
*hard batch*, otherwise an instability.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from ultrathink.orchestrator.detectors.base import Baseline, Detector
from ultrathink.orchestrator.events import Finding
from ultrathink.orchestrator.remembering import Remembers
from ultrathink.orchestrator.signals import SMALL, Signals
from ultrathink.orchestrator.windows import Window, median

JUMP = 6.0  # standard deviations
SMALLEST_JUMP = 0.01  # in the logarithm: less does not matter, even for a very steady loss
BACK = 3.0  # standard deviations: back at its level
NEARLY_BACK = 0.25  # of the jump
SURE = (10.0, 3)  # standard deviations, or steps: two neighbours may both be slightly unusual
CLEAR_JUMP = (math.log(1.5), 20.0)  # in the logarithm, in deviations: high at the end of a log
LASTS = 24  # observed steps after which the new level is accepted
BLOCK = 16  # observed steps per median
NUM_BLOCKS = 64
SLOW_RISE = (math.log(1.05), 8.0)  # above the best block: in the logarithm, in standard errors
FLAT = 1e-6  # smallest deviation of losses that are judged without logarithm
START = 16  # observed steps that define the initial loss
ABOVE_START = (math.log(1.5), 3)  # above the largest of them: in the logarithm, steps in a row


class JudgedLoss(Remembers):
    """Maps a loss to the judged value: its logarithm, or the loss itself once one was negative."""

    remembered = ("is_log",)

    def __init__(self) -> None:
        self.is_log = True

    def __call__(self, loss: float) -> float:
        return math.log(loss + SMALL) if self.is_log else loss

    def loss(self, value: float) -> float:
        """The loss of the judged ``value``."""
        return math.exp(min(value, 700.0)) - SMALL if self.is_log else value

    def described(self, excess: float) -> str:
        if not self.is_log:
            return f"{excess:.3g} above"
        ratio = math.exp(min(excess, 50.0))
        return f"{ratio:.2f} times" if ratio >= 1.1 else f"{ratio - 1:.1%} above"


class LossSpike(Detector):
    """Distinguishes a hard batch (one step) from a lasting spike, and a spike from a divergence."""

    remembered = ("judged", "baseline", "_begin", "_jump", "_peak", "_since")

    def __init__(self) -> None:
        self.judged = JudgedLoss()
        self.baseline = Baseline()
        self._begin: int | None = None  # the step of the jump under observation
        self._jump = 0.0  # its excess
        self._peak = 0.0
        self._since: list[float] = []  # values from the jump on

    def observe(self, signals: Signals) -> list[Finding]:
        loss = signals.finite("loss")
        if loss is None:
            return []
        if loss < 0 and self.judged.is_log:
            self.judged.is_log = False
            self.baseline = Baseline(floor=FLAT)
            self._end()
        value = self.judged(loss)
        if self._begin is not None:
            return self._during(signals.step, value)
        score, excess = self.baseline.score(value), self.baseline.excess(value)
        if score < JUMP or excess < self._smallest():
            self.baseline.add(value, signals.step)
            return []
        self._begin, self._jump, self._peak, self._since = signals.step, excess, excess, [value]
        return []

    def finish(self) -> list[Finding]:
        if self._begin is None or len(self._since) > 1:
            return []
        is_clear = self._jump >= CLEAR_JUMP[0] and self._score() >= CLEAR_JUMP[1]
        severity = "medium" if self.judged.is_log and is_clear else "low"
        text = f"the loss jumped to {self._described(self._since[0])} at the last step of the log"
        return [Finding(self._begin, "loss_spike", severity, text, self._figures())]

    def rewind(self, step: int) -> None:
        self._end()
        self.baseline.rewind(step)

    def _during(self, step: int, value: float) -> list[Finding]:
        assert self._begin is not None
        self._since.append(value)
        score, excess = self.baseline.score(value), self.baseline.excess(value)
        self._peak = max(self._peak, excess)
        is_back = score < BACK or (score < JUMP and excess < NEARLY_BACK * self._peak)
        if is_back:
            findings = []
            if len(self._since) == 2:
                findings = [self._hard_batch(step)]
                self.baseline.add(self._since[0], step - 1)
            self.baseline.add(value, step)
            self._end()
            return findings
        if len(self._since) < LASTS:
            return [self._spike(step)]
        return self._settle(step)

    def _settle(self, step: int) -> list[Finding]:
        """The loss did not come back: accept its new level."""
        last = sorted(self._since[-8:])[4]
        excess, least = self.baseline.excess(last), NEARLY_BACK * self._jump
        if self.judged.is_log:
            least = max(least, SLOW_RISE[0])
        severity = "critical" if self.judged.is_log and excess > math.log(1.5) else "high"
        message = f"the loss stays at {self._described(last)} {LASTS} steps after it jumped"
        figures = self._figures(last)
        finding = Finding(
            step, "divergence", severity, message, figures, self._begin, pause=4 * BLOCK
        )
        since = self._since
        self._end()
        self.baseline.restart()
        for value in since[-16:]:
            self.baseline.add(value, step)
        return [] if excess < least else [finding]

    def _spike(self, step: int) -> Finding:
        is_sure = self._score() >= SURE[0] or len(self._since) >= SURE[1]
        severity = "medium" if is_sure else "low"
        if self.judged.is_log and self._peak >= math.log(1.5):
            severity = "high"
        message = f"the loss jumped to {self._described(self._since[0])} and is not back"
        return Finding(step, "loss_spike", severity, message, self._figures(), self._begin)

    def _hard_batch(self, step: int) -> Finding:
        message = f"one step at {self._described(self._since[0])}, then back: a hard batch"
        severity = "low" if self.judged.is_log and self._jump >= math.log(1.5) else "info"
        return Finding(step, "hard_batch", severity, message, self._figures(), self._begin)

    def _score(self) -> float:
        return self.baseline.score(max(self._since))

    def _described(self, value: float) -> str:
        excess = self.judged.described(self.baseline.excess(value))
        score = self.baseline.score(value)
        return f"{self.judged.loss(value):.4g} ({excess} its level, {score:.0f} deviations)"

    def _figures(self, value: float | None = None) -> dict[str, float]:
        """The figures behind a finding about ``value``, or the highest one."""
        value = max(self._since) if value is None else value
        return {
            "loss": self.judged.loss(value),
            "level": self.judged.loss(value - self.baseline.excess(value)),
            "score": self.baseline.score(value),
        }

    def _smallest(self) -> float:
        return SMALLEST_JUMP if self.judged.is_log else 0.0

    def _end(self) -> None:
        self._begin, self._jump, self._peak, self._since = None, 0.0, 0.0, []


class AboveStart(Detector):
    """Finds a loss far above all of the first ones, several steps in a row.

    A model worse than before training needs no long baseline. The loss falls steeply at first, so
    its variation is estimated by the largest rise from one step to the next.
    """

    remembered = ("_start", "_above", "_since")

    def __init__(self) -> None:
        self._start: list[float] = []
        self._above: list[float] = []  # values in a row that are far above the start
        self._since = 0

    def observe(self, signals: Signals) -> list[Finding]:
        loss = signals.finite("loss")
        if loss is None or loss <= 0:
            return []
        value = math.log(loss)
        if len(self._start) < 2 or value <= self._limit():
            self._above = []
            if len(self._start) < START:
                self._start.append(value)
            return []
        self._since = signals.step if not self._above else self._since
        self._above = [*self._above[-START:], value]
        return self._found(signals.step) if len(self._above) >= ABOVE_START[1] else []

    def finish(self) -> list[Finding]:
        if not 0 < len(self._above) < ABOVE_START[1]:
            return []
        return self._found(self._since, "medium" if len(self._above) > 1 else "low")

    def rewind(self, step: int) -> None:
        self._above = []

    def _limit(self) -> float:
        changes = [after - before for before, after in pairwise(self._start)]
        usual = max(map(abs, changes)) if len(changes) == 1 else max(changes)
        return max(self._start) + max(ABOVE_START[0], 2 * usual)

    def _found(self, step: int, severity: str = "high") -> list[Finding]:
        loss, start = math.exp(max(self._above)), math.exp(max(self._start))
        message = f"the loss, up to {loss:.4g}, is far above the initial {start:.4g}"
        figures = {"loss": loss, "start": start}
        return [Finding(step, "divergence", severity, message, figures, self._since)]


class Divergence(Detector):
    """Finds a loss that rises without a jump: block by block, far above its best block."""

    remembered = ("judged", "_block", "_levels", "_ends", "_spreads", "_num_risen")

    def __init__(self) -> None:
        self.judged = JudgedLoss()
        self._block: list[float] = []
        self._levels = Window(NUM_BLOCKS)  # medians of blocks
        self._ends = Window(NUM_BLOCKS)  # their last steps
        self._spreads = Window(NUM_BLOCKS)  # deviations within blocks
        self._num_risen = 0

    def observe(self, signals: Signals) -> list[Finding]:
        loss = signals.finite("loss")
        if loss is None:
            return []
        if loss < 0:
            self.judged.is_log = False
        if not self.judged.is_log:
            return []
        self._block.append(self.judged(loss))
        if len(self._block) < BLOCK:
            return []
        block, self._block = np.sort(self._block), []
        level, quarter = median(block), BLOCK // 4
        findings = self._judge(signals.step, level)
        self._levels.add(level)
        self._ends.add(signals.step)
        self._spreads.add(float(block[-quarter] - block[quarter - 1]) / 1.349)
        return findings

    def rewind(self, step: int) -> None:
        self._block, self._num_risen = [], 0
        count = int((self._ends.values > step).sum())
        for window in (self._levels, self._ends, self._spreads):
            window.drop_last(count)

    def _judge(self, step: int, level: float) -> list[Finding]:
        if len(self._levels) < 4:
            return []
        levels = self._levels.values
        best = float(levels.min())
        # Standard error of the median of a block, and of the smallest of many such medians.
        error = 1.2533 * self._spreads.median() / math.sqrt(BLOCK)
        rise = level - best - 2 * error
        is_rising = level - float(levels[-4:].min()) > 2 * error  # not settled at a high level
        if rise < max(SLOW_RISE[0], SLOW_RISE[1] * error) or not is_rising:
            self._num_risen = 0
            return []
        self._num_risen += 1
        if self._num_risen < 2:
            return []
        severity = "medium" if rise < math.log(1.2) else "high"
        loss, least = self.judged.loss(level), self.judged.loss(best)
        more = self.judged.described(level - best)
        message = f"the loss has been rising: {loss:.4g}, {more} its best"
        figures = {"loss": loss, "best": least, "score": rise / max(error, FLAT)}
        begin = max(0, step - 2 * BLOCK + 1)
        return [Finding(step, "divergence", severity, message, figures, begin, pause=4 * BLOCK)]


class NonFinite(Detector):
    """Finds losses and gradient norms that are NaN or infinite, or that a log counts as NaN."""

    remembered = ("_in_a_row", "_counted")

    SIGNALS = (("loss", "the loss"), ("val_loss", "the validation loss"), ("grad_norm", "the norm"))

    def __init__(self) -> None:
        self._in_a_row: dict[str, int] = {}
        self._counted = 0.0  # steps whose loss was NaN, as the log counts them

    def observe(self, signals: Signals) -> Iterator[Finding]:
        counted = signals.finite("nan_steps")
        if counted is not None and counted > self._counted:
            text = f"{counted - self._counted:.0f} more steps with a loss of NaN, as the log counts"
            figures = {"nan_steps": counted}
            yield Finding(signals.step, "non_finite", "high", text, figures, subject="nan_steps")
        self._counted = self._counted if counted is None else counted
        for name, words in self.SIGNALS:
            value = signals.values.get(name)
            if value is None:
                continue
            if math.isfinite(value):
                self._in_a_row[name] = 0
                continue
            count = self._in_a_row[name] = self._in_a_row.get(name, 0) + 1
            if name == "grad_norm" and "loss_scale" in signals.values and count < 3:
                severity, more = "info", ", as with an fp16 loss scale that is too high"
            else:
                severity, more = ("critical" if count >= 3 else "high"), ""
            if count > 1:
                more += f", {count} times in a row"
            text = f"{words} is {value}{more}"
            figures = {"in_a_row": float(count)}
            yield Finding(signals.step, "non_finite", severity, text, figures, subject=name)

    def rewind(self, step: int) -> None:
        self._in_a_row = {}


class ZeroLoss(Detector):
    """Finds losses of exactly 0, which no cross-entropy is.

    They come from masked batches, or from gradients that are NaN. After losses near 0 it is one
    that was rounded; the first of a log may be one of a policy gradient.
    """

    remembered = ("_before", "_in_a_row")

    def __init__(self) -> None:
        self._before: dict[str, float] = {}  # the last loss that was not 0
        self._in_a_row: dict[str, int] = {}

    def observe(self, signals: Signals) -> Iterator[Finding]:
        for name in ("loss", "val_loss"):
            value = signals.finite(name)
            if value is None:
                continue
            if value != 0:
                self._before[name], self._in_a_row[name] = value, 0
                continue
            count = self._in_a_row[name] = self._in_a_row.get(name, 0) + 1
            before = self._before.get(name)
            if (before is None and count > 1) or (before is not None and before > SMALL):
                words = "the loss" if name == "loss" else "the validation loss"
                text = (
                    f"{words} is exactly 0, which is impossible: masked labels, or lost gradients"
                )
                figures = {"in_a_row": float(count)}
                yield Finding(signals.step, "zero_loss", "high", text, figures, subject=name)

    def rewind(self, step: int) -> None:
        self._in_a_row = {}
