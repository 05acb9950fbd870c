"""The tables of the page: decisions, events, forecasts, configuration, environment, samples."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from ultrathink.config.overrides import flatten
from ultrathink.config.yaml_format import dump_yaml
from ultrathink.insight.events import gravest
from ultrathink.insight.report.charts import ends_of, interval
from ultrathink.insight.report.forecasts import Foretold
from ultrathink.insight.report.marks import LEVELS, mark_of
from ultrathink.insight.report.markup import (
    NOTHING,
    Content,
    Html,
    figure,
    html,
    moment,
    plural,
    short,
    signed,
    tag,
)
from ultrathink.insight.report.settings import NONE, Setting
from ultrathink.monitoring.jsonl import finite_number
from ultrathink.orchestrator.events import Event
from ultrathink.runs.decisions import Audit, DecisionRecord
from ultrathink.runs.reading import Sample
from ultrathink.runs.segments import Segment

_MOST_EVENTS = 200
_MOST_DECISIONS = 1000
_LONGEST = 400  # characters of one value


def table(
    titles: Sequence[str],
    rows: Sequence[Sequence[Content]],
    kind: str,
    ids: Sequence[str] | None = None,
) -> Html:
    """A table that a narrow screen shows as cards, where an empty cell is left out.

    ``ids`` are what links call the rows.
    """
    head = tag("tr", [tag("th", title, scope="col") for title in titles])
    body = [
        tag(
            "tr",
            [
                tag("td", cell, data_label=title or None, class_=None if cell else "none")
                for title, cell in zip(titles, row, strict=True)
            ],
            id=ids[number] if ids else None,
        )
        for number, row in enumerate(rows)
    ]
    return tag("table", tag("thead", head), tag("tbody", body), class_=kind)


# -- decisions -------------------------------------------------------------------------------------


def decision_table(decisions: Sequence[DecisionRecord]) -> Html:
    """Every decision: what, why, on what evidence, what came of it, and what the audit found."""
    titles = ["", "step", "what was done", "why", "outcome", "audited gain"]
    audits = [one.audit for one in decisions if one.audit is not None]
    if not audits:
        titles.pop()
    ends = ends_of([0.0, *(v for a in audits for v in (a.low, a.high))])
    shown = decisions[:_MOST_DECISIONS]
    rows: list[list[Content]] = [
        [
            tag("span", str(one.number), class_=f"mark lv-{one.level or 0} inline"),
            f"{one.step:,}",
            _action(one),
            _reason(one),
            _outcome(one),
            *([_audit(one.audit, ends)] if audits else []),
        ]
        for one in shown
    ]
    more = len(decisions) - len(shown)
    ids = [f"decision-{one.number}" for one in shown]
    return html(
        table(titles, rows, "cards decisions", ids),
        tag("p", f"and {more:,} more; decisions.jsonl has all.", class_="quiet") if more else None,
    )


def _action(one: DecisionRecord) -> Html:
    change = None
    if one.before is not None or one.after is not None:
        change = tag("div", value(one.before), " → ", value(one.after), class_="change")
    return html(tag("b", one.action.replace("_", " ")), change)


def _reason(one: DecisionRecord) -> Html:
    told = []
    if one.is_by_hand:
        told.append("by hand")
    else:
        told.append(f"rule {one.rule}")
    if one.level is not None:
        told.append(f"level {one.level}, {LEVELS.get(one.level, 'unknown')}")
    if one.confidence is not None:
        told.append(f"confidence {one.confidence:.0%}")
    signals = ", ".join(f"{name} {value(found)}" for name, found in one.signals.items())
    return html(
        tag("div", one.reasoning) if one.reasoning else None,
        tag("small", " · ".join(told)),
        tag("small", signals, class_="signals") if signals else None,
    )


def _outcome(one: DecisionRecord) -> Content:
    if one.outcome is None:
        return None if one.id is None else tag("small", "not known yet")
    resolved, step = one.outcome.get("resolved"), finite_number(one.outcome.get("step"))
    words = {True: ("resolved", "good"), False: ("not resolved", "bad")}
    word, kind = words.get(resolved, ("told", "")) if isinstance(resolved, bool) else ("", "")
    when = f" at step {step:,.0f}" if step is not None else ""
    text = one.outcome.get("text")
    return html(
        tag("span", f"{word}{when}", class_=f"verdict {kind}") if word else None,
        tag("div", str(text)) if text else None,
    )


def _audit(audit: Audit | None, ends: tuple[float, float]) -> Content:
    if audit is None:
        return tag("small", "not audited")
    drawn = interval(audit.low, audit.mean, audit.high, 0.0, ends, audit.verdict)
    # Decimals by which the interval's ends are told to a few per cent of its width.
    width = max(audit.high - audit.low, 1e-9)
    decimals = int(min(9, max(2, math.ceil(1.3 - math.log10(width)))))
    how = [
        plural(audit.orders, "data order") if audit.orders else "",
        plural(audit.horizon, "step") if audit.horizon else "",
    ]
    return html(
        drawn,
        tag("b", f"{signed(audit.mean, decimals)} nats"),
        f" [{signed(audit.low, decimals)}, {signed(audit.high, decimals)}]",
        tag("div", audit.statement, class_=f"verdict {_KINDS[audit.verdict]}"),
        tag("small", ", ".join(filter(None, how))) if any(how) else None,
    )


_KINDS = {"helped": "good", "hurt": "bad", "unproven": ""}


def audit_summary(decisions: Sequence[DecisionRecord]) -> str | None:
    """What all audits come to, in a sentence."""
    verdicts = [one.audit.verdict for one in decisions if one.audit is not None]
    if not verdicts:
        return None
    helped, hurt = verdicts.count("helped"), verdicts.count("hurt")
    return (
        f"{plural(len(verdicts), 'decision')} audited: {helped} helped, {hurt} did harm, "
        f"{verdicts.count('unproven')} not proven either way. Negative is better: validation loss "
        f"with the decision less that without it, the mean of paired replays and its 95% interval."
    )


def value(found: Any) -> str:
    """A value of a decision or a setting in a few characters."""
    if found is None:
        return "none"
    if isinstance(found, bool):
        return "true" if found else "false"
    if isinstance(found, int):
        return f"{found:,}"
    if isinstance(found, float):
        return short(found)
    if isinstance(found, str):
        return _cut(found)
    if isinstance(found, list) and all(isinstance(entry, int | float) for entry in found):
        return _cut(f"[{', '.join(value(entry) for entry in found)}]")
    return _cut(json.dumps(found, ensure_ascii=False, default=str))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


# -- events and forecasts --------------------------------------------------------------------------


def event_table(events: Sequence[Event]) -> Html:
    """Events with their sentences, the gravest of a great many."""
    titles = ["step", "severity", "kind", "what was found"]
    shown = gravest(events, _MOST_EVENTS)
    rows = [
        [
            f"{one.step:,}" + (f" to {one.to_step:,}" if one.to_step > one.step else ""),
            html(tag("b", class_=f"{mark_of(one.severity)} v-{one.severity} inline"), one.severity),
            one.kind.replace("_", " ") + (f" ({one.subject})" if one.subject else ""),
            one.message,
        ]
        for one in shown
    ]
    more = len(events) - len(shown)
    note = f"and {more:,} more, none graver." if more else None
    return html(table(titles, rows, "cards events"), tag("p", note) if note else None)


def forecast_table(foretold: Sequence[Foretold]) -> Html:
    """What was foretold at each share of the budget, beside what came."""
    titles = ["made after", "forecast", "90% interval", "came", ""]
    values = [v for one in foretold for v in (one.forecast.low, one.forecast.high)]
    ends = ends_of([*values, *(one.came for one in foretold if one.came is not None)])
    rows = []
    for one in foretold:
        ahead, came = one.forecast, one.came
        inside = {True: "inside", False: "outside", None: "not there yet"}[one.is_inside]
        kind = {True: "good", False: "bad", None: ""}[one.is_inside]
        drawn = interval(
            ahead.low, ahead.loss, ahead.high, ahead.loss if came is None else came, ends, "ahead"
        )
        rows.append(
            [
                html(f"{one.share:.0%} ", tag("small", f"step {ahead.at_step:,}")),
                figure(ahead.loss),
                f"{figure(ahead.low)} to {figure(ahead.high)}",
                html(
                    figure(came) if came is not None else None,
                    " ",
                    tag("span", inside, class_=f"verdict {kind}"),
                ),
                drawn,
            ]
        )
    return table(titles, rows, "cards forecasts")


# -- configuration, environment, samples -----------------------------------------------------------


def settings_table(settings: Sequence[Setting]) -> Html:
    """The values that somebody set, beside their defaults."""
    rows = [
        [
            tag("code", one.key),
            tag("code", _yaml(one.value)),
            tag("code", NOTHING if one.default == NONE else _yaml(one.default)),
            tag("small", one.origin) if one.origin else None,
        ]
        for one in settings
    ]
    return table(["key", "value", "default", "set by"], rows, "cards settings")


def _yaml(found: Any) -> str:
    if found is None:
        return "unset"
    if isinstance(found, str):
        return _cut(found)
    if isinstance(found, list):
        found = [
            {k: v for k, v in entry.items() if v is not None} if isinstance(entry, dict) else entry
            for entry in found
        ]
    return _cut(dump_yaml(found, one_line=True))


def manifest_table(manifest: dict[str, Any]) -> Html:
    """The facts of the machine and the code, one a line."""
    rows = []
    for key, found in flatten(manifest).items():
        text = " ".join(map(str, found)) if isinstance(found, list) else found
        if key.endswith("memory_bytes") and isinstance(found, int):
            key, text = key.removesuffix("_bytes"), f"{found / 2**30:.1f} GiB"
        elif isinstance(found, int):
            text = f"{found:,}"
        name = key.replace("_", " ").replace("hardware.", "").replace("packages.", "")
        shown = "not known" if text is None else _cut(str(text))
        rows.append(tag("tr", tag("th", name, scope="row"), tag("td", shown)))
    return tag("table", tag("tbody", rows), class_="facts")


def segment_table(segments: Sequence[Segment]) -> Html:
    """Every start of the run."""
    titles = ["start", "after step", "where", "what changed"]
    rows = []
    for one in segments:
        facts = one.environment
        where = [facts.get("device"), facts.get("precision")]
        processes = facts.get("processes")
        if isinstance(processes, int) and processes > 1:
            where.append(plural(processes, "process", "processes"))
        changes = [
            *map(str, one.changes),
            *(f"{part} began anew" for part in one.reset),
            *one.notes,
        ]
        rows.append(
            [
                moment(one.time),
                f"{one.from_step:,}",
                ", ".join(str(fact) for fact in where if fact),
                [tag("div", _cut(change)) for change in changes] or None,
            ]
        )
    return table(titles, rows, "cards segments")


def samples_of(samples: Sequence[Sample]) -> Html:
    """What the model wrote: the last step's texts open, those before folded."""
    steps = [(step, list(found)) for step, found in groupby(samples, key=lambda one: one.step)]
    parts = [
        tag(
            "details",
            tag("summary", f"after step {step:,}"),
            [
                tag("pre", tag("span", one.prompt, class_="prompt"), one.text, class_="sample")
                for one in found
            ],
            open=number == 0,
        )
        for number, (step, found) in enumerate(reversed(steps))
    ]
    return html(parts)
