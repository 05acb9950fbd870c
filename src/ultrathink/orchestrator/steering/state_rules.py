"""The rules for experts without tokens and for memory that is nearly full."""

from __future__ import annotations

from typing import Any

import numpy as np

from ultrathink.monitoring.experts import ExpertStatistics
from ultrathink.orchestrator.detectors.experts import IN_A_ROW
from ultrathink.orchestrator.steering.proposals import MEDIUM, Proposal, confidence_after
from ultrathink.orchestrator.steering.rules import DEAD, Rule, Situation
from ultrathink.training.changes import ReviveExperts as ReviveExpertsChange
from ultrathink.training.changes import SetActivationCheckpointing

LEVELS = ("none", "selective", "full")  # each keeps fewer activations than the one before


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


class SaveMemory(Rule):
    """If memory is nearly full, keep fewer activations, for the rest of the run.

    A compiled step recomputes cheap operations by itself and holds more with ``selective`` than
    with ``none`` (docs/performance.md), so it uses ``full`` at once.
    """

    name = "save_memory"
    cool_down = 16  # steps until the last change shows in the memory in use

    def propose(self, now: Situation) -> Proposal | None:
        share = max(now.memory_share, memory_share(now))
        some, much = now.limits.memory
        if share <= some:
            return None
        level = "full" if share > much or now.is_compiled else "selective"
        if LEVELS.index(level) <= LEVELS.index(now.settings.activation_checkpointing):
            return None
        what = "the products alone" if level == "selective" else "of each block its input alone"
        names = ("memory", "memory_peak", "memory_limit")
        signals = {name: now.values[name] for name in names if name in now.values}
        return Proposal(
            self.name,
            MEDIUM,
            1.0,  # measured
            (SetActivationCheckpointing(level),),
            f"{share:.0%} of the memory is in use: the backward pass gets {what} and computes the "
            f"rest again.",
            {"memory_share": share, **signals},
            now.step,
        )


def memory_share(now: Situation) -> float:
    """The share of its memory that this process had in use; 0 if unknown."""
    limit = now.values.get("memory_limit")
    used = max(now.values.get("memory", 0.0), now.values.get("memory_peak", 0.0))
    return used / limit if limit else 0.0
