"""What lies on the loss curve: phases as bands, decisions as numbered marks, alarms below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ultrathink.insight.report.charts import SIZE, Span
from ultrathink.insight.report.markup import Html, html, plural, tag
from ultrathink.orchestrator.events import SEVERITIES, Event, is_alarm
from ultrathink.orchestrator.phases import (
    CONVERGING,
    DIVERGING,
    INITIALIZATION,
    PLATEAU,
    VOLATILE,
    Phase,
)
from ultrathink.runs.decisions import DecisionRecord

PHASES = {
    INITIALIZATION: "too little is known",
    VOLATILE: "an alarm a moment ago",
    CONVERGING: "the loss falls",
    PLATEAU: "it stands still",
    DIVERGING: "it rises",
}
LEVELS = {1: "soft", 2: "medium", 3: "hard", 4: "critical"}
_STRIP = 13  # height of a phase's own colour at the top, in the plot's units
_MAX_MARKS = 150  # of events, next to each other
_MAX_LANES = 4
_NUMBER_SHARE = 0.07  # of the width that a number takes on a phone
_LETTER_SHARE = 0.0068  # and a letter of its name on a wide screen
_TO_THE_LEFT = 0.8  # of the width: from here on a mark stands to the left of its line
_FEW = 12  # decisions whose names are written out
MANY = 24  # from here on several share a mark, and their lines are faint
_MANY_SHARE = 0.17  # of the width that such a mark takes on a phone


def bands(phases: Sequence[Phase], span: Span) -> Html:
    """The phases behind the curve, in the plot's units; they touch each other."""
    rects = []
    for number, phase in enumerate(phases):
        end = float(phase.to_step)
        if number + 1 < len(phases):
            end = max(end, float(phases[number + 1].from_step))
        left, right = span.share(phase.from_step), span.share(end)
        place = {"x": f"{SIZE * left:.1f}", "width": f"{SIZE * max(0.001, right - left):.1f}"}
        kind = f"band p-{phase.phase}"
        rects += [
            tag("rect", **place, y="0", height=f"{SIZE:.0f}", class_=kind),
            tag("rect", **place, y="0", height=_STRIP, class_=f"{kind} strip"),
        ]
    return tag("g", rects, class_="bands")


def phase_legend(phases: Sequence[Phase]) -> Html | None:
    """The colours of the phases that there were."""
    present = {phase.phase for phase in phases}
    if not present:
        return None
    return tag(
        "p",
        tag("span", "Phases", class_="entry quiet"),
        [
            tag(
                "span",
                tag("i", class_=f"swatch p-{name}"),
                name,
                tag("small", f" {meaning}"),
                class_="entry",
            )
            for name, meaning in PHASES.items()
            if name in present
        ],
        class_="legend phases",
    )


@dataclass(frozen=True)
class _Badge:
    """One mark, of one decision or of several that stand too close."""

    share: float
    lane: int
    decisions: list[DecisionRecord]


def decision_marks(decisions: Sequence[DecisionRecord], span: Span) -> Html | None:
    """Numbered marks above the plot, each with a line down into it and a link to its row."""
    if not decisions:
        return None
    badges = _placed(decisions, span, is_named=len(decisions) <= _FEW)
    lanes = max(badge.lane for badge in badges) + 1
    marks = [_badge(badge, is_named=len(decisions) <= _FEW) for badge in badges]
    return tag("div", marks, class_="lanes", style=f"--lanes:{lanes}")


def decision_lines(decisions: Sequence[DecisionRecord], span: Span) -> Html | None:
    """A line through the plot at each decision, in the plot's units."""
    if not decisions:
        return None
    lines = [
        tag(
            "path",
            d=f"M{SIZE * span.share(one.step):.1f} 0V{SIZE:.0f}",
            class_=f"decided lv-{one.level or 0}",
        )
        for one in decisions
    ]
    return tag("g", lines, class_="decisions many" if len(decisions) > MANY else "decisions")


def _placed(decisions: Sequence[DecisionRecord], span: Span, *, is_named: bool) -> list[_Badge]:
    """Each decision in the first lane that has room; where none has, it joins the one before."""
    ends: list[float] = []
    badges: list[_Badge] = []
    for decision in sorted(decisions, key=lambda one: one.step):
        share = span.share(decision.step)
        name = _LETTER_SHARE * (len(decision.action) + 5) if is_named else 0.0
        room = max(_NUMBER_SHARE if len(decisions) <= MANY else _MANY_SHARE, name)
        begin = share - room if share > _TO_THE_LEFT else share
        free = next((lane for lane, end in enumerate(ends) if end <= begin), None)
        if free is None and len(ends) < _MAX_LANES:
            ends.append(0.0)
            free = len(ends) - 1
        if free is None:
            badges[-1].decisions.append(decision)
            continue
        ends[free] = begin + room
        badges.append(_Badge(share, free, [decision]))
    return badges


def _badge(badge: _Badge, *, is_named: bool) -> Html:
    first, last = badge.decisions[0], badge.decisions[-1]
    number = str(first.number) if first is last else f"{first.number} +{len(badge.decisions) - 1}"
    title = "\n".join(
        f"{one.number}. step {one.step:,}: {one.action} ({one.rule}). {one.reasoning}"
        for one in badge.decisions
    )
    side = " left" if badge.share > _TO_THE_LEFT else ""
    name = tag("small", first.action) if is_named and first is last else None
    return tag(
        "a",
        number,
        name,
        href=f"#decision-{first.number}",
        class_=f"mark lv-{first.level or 0}{side}",
        style=f"left:{100 * badge.share:.2f}%;--lane:{badge.lane}",
        title=title,
        data_step=first.step,
    )


def event_rail(events: Sequence[Event], span: Span) -> Html | None:
    """Alarms as triangles below the plot with their lengths; lesser events as short strokes."""
    if not events:
        return None
    nearby: dict[int, list[Event]] = {}
    for event in events:
        nearby.setdefault(int(span.share(event.step) * _MAX_MARKS), []).append(event)
    marks = [_event(*_gravest(there), span) for there in nearby.values()]
    return tag("div", marks, class_="rail")


def _gravest(events: Sequence[Event]) -> tuple[Event, int]:
    """The gravest of events that would lie on each other, and how many others there are."""
    return max(events, key=lambda event: SEVERITIES.index(event.severity)), len(events) - 1


def _event(event: Event, num_others: int, span: Span) -> Html:
    left, right = span.share(event.step), span.share(event.to_step)
    where = f"step {event.step:,}"
    if event.to_step > event.step:
        where = f"steps {event.step:,} to {event.to_step:,}"
    title = f"{event.kind}, {event.severity}, {where}: {event.message}"
    if num_others:
        title += f" ({plural(num_others, 'other')} near it)"
    reach = None
    if event.is_alarm and right > left:
        style = f"left:{100 * left:.2f}%;width:{100 * (right - left):.2f}%"
        reach = tag("i", class_=f"reach v-{event.severity}", style=style)
    kind = f"{mark_of(event.severity)} v-{event.severity}"
    return html(reach, tag("b", class_=kind, style=f"left:{100 * left:.2f}%", title=title))


def mark_of(severity: str) -> str:
    """The class of the mark for events of a severity: alarms stand out."""
    return "alarm" if is_alarm(severity) else "event"


def event_legend(events: Sequence[Event]) -> Html | None:
    """What the marks below the plot are."""
    if not events:
        return None
    counts = {s: sum(event.severity == s for event in events) for s in SEVERITIES}
    entries = [
        tag(
            "span",
            tag("b", class_=f"{mark_of(s)} v-{s} inline"),
            f"{s} ",
            tag("small", f"{count:,}"),
            class_="entry",
        )
        for s, count in reversed(counts.items())
        if count
    ]
    title = tag("span", plural(len(events), "event"), class_="entry quiet")
    return tag("p", title, entries, class_="legend")
