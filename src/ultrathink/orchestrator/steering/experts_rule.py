"""The rule for experts without tokens."""

from __future__ import annotations

from typing import Any

import numpy as np

from ultrathink.monitoring.experts import ExpertStatistics
from ultrathink.orchestrator.detectors.experts import IN_A_ROW
from ultrathink.orchestrator.steering.proposals import MEDIUM, Proposal, confidence_after
from ultrathink.orchestrator.steering.rules import DEAD, Rule, Situation
from ultrathink.training.changes import ReviveExperts as ReviveExpertsChange


class ReviveExperts(Rule):
    """If experts get no tokens, and a rollback does not help or is impossible, re-initialize them.

    A rollback is the harder intervention, so if it is proposed it is tried first, once.
    """

    name = "revive_experts"
    cool_down = 0  # each group is reported once

    def propose(self, now: Situation) -> Proposal | None:
        events = [event for event in now.events if event.kind == DEAD]
        if not events or now.experts is None:
            return None
        dead = [one for event in events for one in dead_experts(now.experts, event.subject)]
        if not dead:
            return None
        text = "; ".join(event.message for event in events)
        return Proposal(
            self.name,
            MEDIUM,
            confidence_after(IN_A_ROW),
            (ReviveExpertsChange(dead),),
            f"{text[0].upper()}{text[1:]}; each becomes a copy of the busiest of its group and "
            f"layer.",
            events[0].values,
            min(event.step for event in events),
            judged_after=200,  # by then the copies have diverged
        )


def dead_experts(statistics: ExpertStatistics, name: str) -> list[dict[str, Any]]:
    """The experts of group ``name`` without tokens, each by ``layer``, ``group``, ``expert``."""
    [slots] = [group.slots for group in statistics.groups if group.name == name]
    is_dead = (statistics.load[:, slots] == 0) & statistics.active[:, slots]
    return [
        {"layer": statistics.layers[row], "group": name, "expert": int(expert)}
        for row, expert in np.argwhere(is_dead).tolist()
    ]
