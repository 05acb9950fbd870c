"""The rule for memory that is nearly full."""

from __future__ import annotations

from ultrathink.orchestrator.steering.proposals import MEDIUM, Proposal
from ultrathink.orchestrator.steering.rules import Rule, Situation
from ultrathink.training.changes import SetActivationCheckpointing

LEVELS = ("none", "selective", "full")  # each keeps fewer activations than the one before


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
