"""Notices what goes wrong with experts over several logged steps, for somebody to be told."""

from __future__ import annotations

from typing import Any

import numpy as np

from ultrathink.core.protocols import State
from ultrathink.monitoring.experts import ExpertStatistics, GroupSlots
from ultrathink.monitoring.records import Note

IN_A_ROW = 5  # logged steps
MIN_EXPECTED = 20.0  # tokens: so many an expert should have had before none is no accident
MUCH_DROPPED = 0.1  # of what a group was sent
_LISTED = 8


class ExpertWatch:
    """Tells of dead experts and of much that is dropped: once for each group and kind.

    An expert counts as dead where no token chose it at ``IN_A_ROW`` logged steps one after the
    other, though even loads would have brought it ``MIN_EXPECTED`` tokens. Warm-up is not judged,
    nor are steps without tokens.
    """

    def __init__(self) -> None:
        self._idle: dict[tuple[str, int, int], int] = {}  # group, layer, expert -> steps in a row
        self._dropping: dict[str, int] = {}  # likewise, by group
        self._told: set[str] = set()

    def observe(self, statistics: ExpertStatistics) -> list[Note]:
        """Take the statistics of a logged step; what there is to tell."""
        if statistics.num_tokens == 0 or statistics.warmup < 1:
            return []
        self._count(statistics)
        notes: list[Note] = []
        for group in statistics.groups:
            for kind, text in (
                ("dead", self._of_dead(statistics, group)),
                ("dropped", self._of_dropped(statistics, group)),
            ):
                if text and f"{kind} {group.name}" not in self._told:
                    self._told.add(f"{kind} {group.name}")
                    notes.append((text, "warning"))
        return notes

    def state_dict(self) -> State:
        """What to remember over a restart."""
        return {
            "idle": [[*key, count] for key, count in self._idle.items()],
            "dropping": dict(self._dropping),
            "told": sorted(self._told),
        }

    def load_state_dict(self, state: State) -> None:
        """Go back to what ``state_dict`` returned; an empty one is that of a new run."""
        values: dict[str, Any] = dict(state)
        self._idle = {
            (name, layer, expert): count for name, layer, expert, count in values.get("idle", ())
        }
        self._dropping = dict(values.get("dropping", {}))
        self._told = set(values.get("told", ()))

    def _count(self, statistics: ExpertStatistics) -> None:
        before, self._idle = self._idle, {}
        idle = (statistics.load == 0) & statistics.active
        for group in statistics.groups:
            for row, expert in np.argwhere(idle[:, group.slots]).tolist():
                key = (group.name, statistics.layers[row], expert)
                self._idle[key] = before.get(key, 0) + 1
            sent, dropped = (
                values[:, group.slots].sum() for values in (statistics.load, statistics.dropped)
            )
            is_much = dropped > MUCH_DROPPED * sent
            self._dropping[group.name] = self._dropping.get(group.name, 0) + 1 if is_much else 0

    def _of_dead(self, statistics: ExpertStatistics, group: GroupSlots) -> str:
        num_experts = statistics.active[:, group.slots].sum(1)
        expected = group.top_k * statistics.num_tokens / num_experts.clip(1)  # at each step
        by_layer = dict(zip(statistics.layers, expected.tolist(), strict=True))
        dead = [
            f"{expert} in layer {layer}"
            for (name, layer, expert), count in self._idle.items()
            if name == group.name and count >= IN_A_ROW and count * by_layer[layer] >= MIN_EXPECTED
        ]
        if not dead:
            return ""
        where = ", ".join(dead) if len(dead) <= _LISTED else f"of {num_experts.sum()} in all layers"
        return (
            f"group {group.name} has {len(dead)} dead expert{'s' if len(dead) > 1 else ''} "
            f"({where}), without a token at {IN_A_ROW} logged steps in a row; a larger "
            f"model.moe.balance.load or model.moe.balance.bias_rate spreads tokens more evenly"
        )

    def _of_dropped(self, statistics: ExpertStatistics, group: GroupSlots) -> str:
        if self._dropping[group.name] < IN_A_ROW:
            return ""
        sent, dropped = (
            values[:, group.slots].sum() for values in (statistics.load, statistics.dropped)
        )
        return (
            f"{dropped / sent:.0%} of what group {group.name} is sent was dropped, and more than "
            f"{MUCH_DROPPED:.0%} at {IN_A_ROW} logged steps in a row; a larger "
            f"model.moe.routing.capacity_factor, or none, drops less"
        )
