"""Chooses among what the rules propose: one decision at a time, within what the user allows."""

from __future__ import annotations

from ultrathink.config.orchestrator import LimitsConfig, RulesConfig
from ultrathink.orchestrator.remembering import Remembers
from ultrathink.orchestrator.steering.proposals import GOES_BACK, Proposal
from ultrathink.orchestrator.steering.rules import RULES, Rule, Situation


class Policy(Remembers):
    """Asks every rule that is switched on, and takes the gravest proposal that may be carried out.

    It counts boundaries, not steps, which go back with the run.
    """

    remembered = ("num_rollbacks", "_count", "_rests_until")

    def __init__(self, rules: RulesConfig, limits: LimitsConfig) -> None:
        self.limits = limits
        self.rules: list[Rule] = [make() for make in RULES if getattr(rules, make.name)]
        self.num_rollbacks = 0
        self._count = 0
        self._rests_until: dict[str, int] = {}

    def decide(self, now: Situation) -> Proposal | None:
        """The proposal to carry out at this boundary, if any."""
        self._count += 1
        found = []
        for rule in self.rules:
            if self._count < self._rests_until.get(rule.name, 0):
                continue
            proposal = rule.propose(now)
            if proposal is not None and proposal.is_sure_enough and self._is_allowed(proposal):
                found.append((proposal.level, proposal.confidence, rule.cool_down, proposal))
        if not found:
            return None
        _, _, cool_down, proposal = max(found, key=lambda one: one[:2])
        self._rests_until[proposal.rule] = self._count + cool_down + 1
        self.num_rollbacks += any(action.name in GOES_BACK for action in proposal.actions)
        return proposal

    def _is_allowed(self, proposal: Proposal) -> bool:
        names = {action.name for action in proposal.actions}
        if names & set(GOES_BACK) and self.num_rollbacks >= self.limits.rollbacks:
            return False
        return "stop" not in names or self.limits.may_stop
