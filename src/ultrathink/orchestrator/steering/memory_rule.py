"""The rule about memory that runs short."""

from __future__ import annotations

from ultrathink.orchestrator.steering.proposals import MEDIUM, Proposal
from ultrathink.orchestrator.steering.rules import Rule, Situation
from ultrathink.training.changes import SetActivationCheckpointing

LEVELS = ("none", "selective", "full")  # each keeps less than the one before


class SaveMemory(Rule):
    """Much of the memory is in use: keep fewer activations, and never more again in this run.

    A compiled step computes again by itself what is cheap, and then holds more with ``selective``
    than with ``none`` (docs/performance.md): it goes to ``full`` at once.
    """

    name = "save_memory"
    cool_down = 16  # until then the last change shows in what is in use

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
            1.0,  # it was measured
            (SetActivationCheckpointing(level),),
            f"{share:.0%} of the memory is in use: the backward pass gets {what} and computes the "
            f"rest again.",
            {"memory_share": share, **signals},
            now.step,
        )


def memory_share(now: Situation) -> float:
    """The share of its memory that this process had in use; 0 where that is not known."""
    limit = now.values.get("memory_limit")
    used = max(now.values.get("memory", 0.0), now.values.get("memory_peak", 0.0))
    return used / limit if limit else 0.0
