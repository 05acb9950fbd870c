"""Groups of experts: collapse, imbalance, dead experts, dropped tokens.

The figures are those of ``experts.jsonl`` (docs/experts.md), the worst over the layers of a group:
``gini``, ``gini_of_noise``, ``entropy_normalized``, ``dead``, ``dropped_share``, and ``even_load``,
the tokens of each expert under a perfectly even load.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping

from ultrathink.orchestrator.detectors.base import Detector
from ultrathink.orchestrator.events import Finding
from ultrathink.orchestrator.remembering import PerName
from ultrathink.orchestrator.signals import Signals
from ultrathink.orchestrator.windows import Window

IN_A_ROW = 5  # logged steps
SETTLED = (24, 200)  # logged steps with an even load, and steps of the run; earlier, balancing has
# not converged
STEPS = {"dead_expert": 50}  # minimum duration in steps, in addition to IN_A_ROW
EARLY_STEPS = 300  # minimum duration of any finding in a group that has never settled
NO_ACCIDENT = 8.0  # expected tokens: an expert with this many has none by chance only very rarely
UNEVEN = 0.5  # Gini coefficient above that of chance: half of the experts do nearly all the work
COLLAPSED = 0.8
SHARP = 0.02  # normalized entropy: every token puts nearly all weight on one expert
MUCH_DROPPED = 0.1
RISEN = 0.2  # of the Gini coefficient, above its usual value


class Experts(Detector):
    """Judges the figures of every group; a finding must last for some logged steps."""

    remembered = ("_lasting", "_usual")

    def __init__(self) -> None:
        self._lasting: dict[str, list[int]] = {}  # kind/group -> first step, logged steps
        self._usual = PerName(lambda: Window(32))  # Gini coefficients of a group

    def observe(self, signals: Signals) -> Iterator[Finding]:
        groups: dict[str, dict[str, float]] = defaultdict(dict)
        for name, value in signals.having("experts/").items():
            group, _, figure = name.rpartition("/")
            groups[group][figure] = value
        for group, figures in groups.items():
            yield from self._judge(signals.step, group, figures)

    def rewind(self, step: int) -> None:
        self._lasting.clear()

    def _judge(self, step: int, group: str, figures: Mapping[str, float]) -> list[Finding]:
        found: list[tuple[str, str, str]] = []  # kind, severity, message
        gini = figures.get("gini", 0.0) - figures.get("gini_of_noise", 0.0)
        entropy = figures.get("entropy_normalized", 1.0)
        usual = self._usual[group]
        is_settled = len(usual) >= SETTLED[0] and step >= SETTLED[1]
        risen = gini - usual.median() if is_settled else 0.0
        if gini > COLLAPSED:
            text = f"group {group} has collapsed onto few experts (Gini coefficient {gini:.2f})"
            found.append(("expert_collapse", "high", text))
        elif gini > UNEVEN or risen > RISEN:
            text = f"the load of group {group} is uneven (Gini coefficient {gini:.2f})"
            if risen > RISEN:
                text += f"; it was {usual.median():.2f}"
            found.append(("expert_imbalance", "medium", text))
        else:
            usual.add(gini)
        if entropy < SHARP:
            text = f"the router of group {group} has collapsed: normalized entropy {entropy:.3f}"
            found.append(("expert_collapse", "medium", text))
        if figures.get("dead", 0.0) > 0 and figures.get("even_load", math.inf) >= NO_ACCIDENT:
            number = round(figures["dead"])
            text = f"group {group} has {number} dead expert{'s' * (number > 1)} (no tokens)"
            found.append(("dead_expert", "medium", text))
        if figures.get("dropped_share", 0.0) > MUCH_DROPPED:
            share = figures["dropped_share"]
            text = f"group {group} drops {share:.0%} of its tokens"
            found.append(("dropped_tokens", "medium", text))
        kinds = self._that_last(step, group, {kind for kind, _, _ in found}, is_settled)
        return [
            Finding(step, kind, severity, text, dict(figures), subject=group)
            for kind, severity, text in found
            if kind in kinds
        ]

    def _that_last(self, step: int, group: str, kinds: set[str], is_settled: bool) -> set[str]:
        """Those of ``kinds`` that have lasted long enough to report; forgets those that ended."""
        for key in list(self._lasting):
            kind, _, name = key.partition("/")
            if name == group and kind not in kinds:
                del self._lasting[key]
        lasting = set()
        for kind in kinds:
            first, count = self._lasting.get(f"{kind}/{group}", (step, 0))
            self._lasting[f"{kind}/{group}"] = [first, count + 1]
            least = STEPS.get(kind, 0) if is_settled else EARLY_STEPS
            if count + 1 >= IN_A_ROW and step - first >= least:
                lasting.add(kind)
        return lasting
