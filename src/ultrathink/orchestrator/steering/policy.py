"""Chooses among the proposals of the rules: one at a time, within the configured limits."""

from __future__ import annotations

from ultrathink.config.orchestrator import LimitsConfig, RulesConfig
from ultrathink.orchestrator.remembering import Remembers
from ultrathink.orchestrator.steering.find_rate import FindRate
from ultrathink.orchestrator.steering.proposals import Proposal
from ultrathink.orchestrator.steering.rules import (
    CorrectRate,
    RollBack,
    Rule,
    Situation,
    StopOverfitting,
)
from ultrathink.orchestrator.steering.safety_net import SafetyNet
from ultrathink.orchestrator.steering.state_rules import ReviveExperts, SaveMemory
from ultrathink.training.changes import Rollback, Stop

RULES: tuple[type[Rule], ...] = (
    CorrectRate,
    RollBack,
    StopOverfitting,
    FindRate,
    ReviveExperts,
    SaveMemory,
)


class Policy(Remembers):
    """Asks every enabled rule, and chooses the most severe proposal that is allowed.

    It counts boundaries instead of steps, because a rollback resets the step.
    """

    remembered = ("num_rollbacks", "_count", "_rests_until", "_rules")

    def __init__(
        self, rules: RulesConfig, limits: LimitsConfig, *, has_held_out: bool = True
    ) -> None:
        self.limits = limits
        self.net = SafetyNet(has_text=has_held_out)
        chosen = [make() for make in RULES if getattr(rules, make.name)]
        self.rules: list[Rule] = [self.net, *chosen]
        self._rules = {one.name: one for one in self.rules if isinstance(one, Remembers)}
        self.num_rollbacks = 0
        self.busy: str | None = None  # name of a rule that must act alone
        self._count = 0
        self._rests_until: dict[str, int] = {}

    def decide(self, now: Situation) -> Proposal | None:
        """The proposal to apply at this boundary, if any."""
        self._count += 1
        found = []
        busy = [rule for rule in self.rules if rule.is_busy(now)]
        self.busy = busy[0].name if busy else None
        for rule in busy[:1] or self.rules:
            if self._count < self._rests_until.get(rule.name, 0) or rule.name in self.net.spent:
                continue
            proposal = rule.propose(now)
            if proposal is not None and proposal.is_sure_enough and self._is_allowed(proposal):
                found.append((proposal.level, proposal.confidence, rule.cool_down, proposal))
        if not found:
            return None
        _, _, cool_down, proposal = max(found, key=lambda one: one[:2])
        self._rests_until[proposal.rule] = self._count + cool_down + 1
        self.num_rollbacks += any(isinstance(one, Rollback) for one in proposal.changes)
        return proposal

    def take_outcomes(self) -> dict[str, tuple[bool, str]]:
        """The outcomes that rules found for their last decisions, since the last call."""
        found = {rule.name: rule.outcome for rule in self.rules if rule.outcome is not None}
        for rule in self.rules:
            rule.outcome = None
        return found

    def _is_allowed(self, proposal: Proposal) -> bool:
        kinds = {type(one) for one in proposal.changes}
        if Rollback in kinds and self.num_rollbacks >= self.limits.rollbacks:
            return False
        return Stop not in kinds or self.limits.may_stop
