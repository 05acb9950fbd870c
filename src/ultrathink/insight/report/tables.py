"""Texts in the page's tables: decisions, configuration, environment."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from ultrathink.config.overrides import flatten
from ultrathink.config.yaml_format import dump_yaml
from ultrathink.insight.report.marks import LEVELS
from ultrathink.insight.report.markup import plural, short
from ultrathink.runs.decisions import Audit, DecisionRecord
from ultrathink.runs.segments import Segment

MOST_EVENTS = 200
MOST_DECISIONS = 1000
_LONGEST = 400  # characters of one value


def reason(one: DecisionRecord) -> str:
    """The rule, level and confidence of a decision."""
    parts = ["by hand" if one.is_by_hand else f"rule {one.rule}"]
    if one.level is not None:
        parts.append(f"level {one.level}, {LEVELS.get(one.level, 'unknown')}")
    if one.confidence is not None:
        parts.append(f"confidence {one.confidence:.0%}")
    return " · ".join(parts)


def no_decisions(mode: str | None) -> str:
    """Why a run with this ``orchestrator.mode`` has no decisions."""
    return {
        "advise": "The orchestrator watched this run and changed nothing: orchestrator.mode is "
        "advise, the default. With orchestrator.mode=act it reacts to alarms, and each decision "
        "is listed here.",
        "act": "The orchestrator could change this run (orchestrator.mode=act) and had no reason.",
        "off": "The orchestrator was off (orchestrator.mode=off).",
    }.get(mode or "", "No decisions are recorded.")


def audit_decimals(audit: Audit) -> int:
    """Decimals that show the ends of its interval to a few per cent of its width."""
    width = max(audit.high - audit.low, 1e-9)
    return int(min(9, max(2, math.ceil(1.3 - math.log10(width)))))


def audit_basis(audit: Audit) -> str:
    """The number and length of the replays of an audit."""
    orders, horizon = audit.orders, audit.horizon
    how = [
        plural(orders, "data order") if orders else "",
        plural(horizon, "step") if horizon else "",
    ]
    return ", ".join(filter(None, how))


def audit_summary(decisions: Sequence[DecisionRecord]) -> str:
    """All audits in a sentence; empty for none."""
    verdicts = [one.audit.verdict for one in decisions if one.audit is not None]
    if not verdicts:
        return ""
    helped, hurt = verdicts.count("helped"), verdicts.count("hurt")
    return (
        f"{plural(len(verdicts), 'decision')} audited: {helped} helped, {hurt} did harm, "
        f"{verdicts.count('unproven')} not proven either way. The gain is validation loss with the "
        f"decision minus without it, so negative is better: the mean of paired replays and its 95% "
        f"interval."
    )


def value(found: Any) -> str:
    """A value of a decision in a few characters."""
    if found is None:
        return "none"
    if isinstance(found, bool):
        return "true" if found else "false"
    if isinstance(found, int):
        return f"{found:,}"
    if isinstance(found, float):
        return short(found)
    if isinstance(found, str):
        return cut(found)
    if isinstance(found, list) and all(isinstance(entry, int | float) for entry in found):
        return cut(f"[{', '.join(value(entry) for entry in found)}]")
    return cut(json.dumps(found, ensure_ascii=False, default=str))


def cut(text: str) -> str:
    """``text``, cut where it is long."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def setting(found: Any) -> str:
    """A value of the configuration as YAML, without null values in the parts of a list."""
    if found is None:
        return "unset"
    if isinstance(found, str):
        return cut(found)
    if isinstance(found, list):
        found = [
            {k: v for k, v in entry.items() if v is not None} if isinstance(entry, dict) else entry
            for entry in found
        ]
    return cut(dump_yaml(found, one_line=True))


def facts(manifest: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and values of the manifest: machine, packages, code, data."""
    for key, found in flatten(manifest).items():
        text = " ".join(map(str, found)) if isinstance(found, list) else found
        if key.endswith("memory_bytes") and isinstance(found, int):
            key, text = key.removesuffix("_bytes"), f"{found / 2**30:.1f} GiB"
        elif isinstance(found, int):
            text = f"{found:,}"
        name = key.replace("_", " ").replace("hardware.", "").replace("packages.", "")
        yield name, "not known" if text is None else cut(str(text))


def place(segment: Segment) -> str:
    """Device, precision and processes of a start of the run."""
    facts = segment.environment
    where = [facts.get("device"), facts.get("precision")]
    processes = facts.get("processes")
    if isinstance(processes, int) and processes > 1:
        where.append(plural(processes, "process", "processes"))
    return ", ".join(str(fact) for fact in where if fact)


def changes(segment: Segment) -> list[str]:
    """Changes of a start of the run."""
    reset = (f"{part} was reset" for part in segment.reset)
    return [*map(str, segment.changes), *reset, *segment.notes]
