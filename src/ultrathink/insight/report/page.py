"""The page: one HTML file with its styles and its script inside, which asks nobody for anything."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from importlib import resources
from typing import Any

import numpy as np

from ultrathink.insight.report import marks, tables
from ultrathink.insight.report.charts import Line, Span, chart, step_axis, step_ticks
from ultrathink.insight.report.curves import Series, at, smoothed, thinned
from ultrathink.insight.report.gathering import Story
from ultrathink.insight.report.headline import headline, state_of
from ultrathink.insight.report.loads import GroupCourse
from ultrathink.insight.report.markup import (
    Content,
    Html,
    figure,
    html,
    moment,
    plural,
    tag,
)
from ultrathink.monitoring.heat_map import Picture, course_map, load_map

_POINTED = 1200  # points of a curve that the pointer can read


def render(story: Story) -> str:
    """The whole page as text."""
    style, script = _part("report.css"), _part("report.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src '{_hash(script)}'; base-uri 'none'; form-action 'none'"
    )
    head = html(
        tag("meta", charset="utf-8"),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{story.name}: training report"),
        Html(f"<style>{style}</style>"),
    )
    data = json.dumps(_pointer_data(story), allow_nan=False, separators=(",", ":"))
    # Inside a script no entity is read: only what would end it must not be there.
    data = data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    body = html(
        tag("main", headline(story), _notes(story), *_sections(story)),
        tag("footer", f"Made {moment(story.made)} by ultrathink report from {story.path}."),
        tag("div", id="tip", hidden=True, aria_hidden="true"),
        Html(f'<script type="application/json" id="data">{data}</script>'),
        Html(f"<script>{script}</script>"),
    )
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>{head}</head>\n<body>{body}</body>\n</html>\n'


def _part(name: str) -> str:
    folder = resources.files("ultrathink.insight.report")
    return (folder / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _sections(story: Story) -> list[Html | None]:
    return [
        _course(story),
        _decisions(story),
        _events(story),
        _forecast(story),
        _experts(story),
        _samples(story),
        _configuration(story),
        _environment(story),
    ]


def _section(name: str, title: str, *content: Content, lead: str | None = None) -> Html:
    told = tag("p", lead, class_="lead") if lead else None
    return tag("section", tag("h2", title), told, *content, id=name)


def _notes(story: Story) -> Html | None:
    if not story.notes:
        return None
    return tag("ul", [tag("li", note) for note in story.notes], class_="notes")


# -- the course ------------------------------------------------------------------------------------


def _course(story: Story) -> Html:
    if not story.last_step:
        text = "Nothing was logged yet: there is no course to show."
        return _section("course", "Course", tag("p", text, class_="empty"))
    span = span_of(story)
    content = [_loss_chart(story, span)]
    lines = {
        "lr": "Learning rate",
        "grad_norm": "Gradient norm, before clipping",
        "tokens_per_sec": "Tokens per second",
    }
    small = []
    for key, title in lines.items():
        curve = story.curves[key]
        drawn = [Line(key, "", curve, is_raw=key != "lr")]
        if key != "lr" and len(smooth := smoothed(curve)):
            drawn = [Line(f"{key} faint", "", curve, is_raw=True), Line(key, "", smooth)]
        small.append(chart(key, title, drawn, span, from_zero=True))
    content.append(tag("div", small, class_="small-charts"))
    return _section("course", "Course", *content)


def span_of(story: Story) -> Span:
    """From the first logged step to the last."""
    firsts = [records[0].step for records in (story.train, story.val) if records]
    return Span(float(min(firsts)), float(story.last_step))


def _loss_chart(story: Story, span: Span) -> Html:
    loss, val = story.curves["loss"], story.val_loss
    smooth = smoothed(loss)
    lines = [Line("raw", "training, each logged step", loss, is_raw=True)]
    if len(smooth):
        lines.append(Line("smooth", "training, smoothed", smooth))
    if len(val.finite):
        lines.append(Line("val", "validation", val, "joined dots"))
    undone = [Series.of(part) for part in story.replay.undone]
    for number, part in enumerate(undone):
        name = "undone by a rollback" if number == 0 else ""
        lines.insert(0, Line("undone", name, part, is_aside=True))
    basis = smooth if len(smooth) else loss
    points = [(one.step, at(basis, one.step)) for one in story.decisions]
    placed = Series.of([(step, value) for step, value in points if value is not None])
    if len(placed) and len(story.decisions) <= marks.MANY:
        lines.append(Line("decision", "decision", placed, "dots"))
    drawn = chart(
        "loss",
        "Loss, nats per token",
        lines,
        span,
        behind=html(
            marks.bands(story.replay.phases, span),
            marks.decision_lines(story.decisions, span),
        ),
        above=marks.decision_marks(story.decisions, span),
        below=marks.event_rail(story.events, span),
        has_switch=True,
    )
    if drawn is None:
        return tag("p", "No loss that was logged is a finite number.", class_="empty")
    has_log = "s-log" in drawn
    return tag(
        "div",
        _switch() if has_log else None,
        drawn,
        marks.phase_legend(story.replay.phases),
        marks.event_legend(story.events),
        class_="with-switch",
    )


def _switch() -> Html:
    """Linear or logarithmic: two buttons that need no script."""
    return tag(
        "div",
        tag("input", type="radio", name="scale", id="linear", checked=True),
        tag("label", "linear", for_="linear"),
        tag("input", type="radio", name="scale", id="log"),
        tag("label", "log", for_="log"),
        class_="switch",
        role="radiogroup",
        aria_label="scale of the loss",
    )


# -- what happened ---------------------------------------------------------------------------------


def _decisions(story: Story) -> Html | None:
    if not story.decisions:
        text = "Nobody changed the run while it trained."
        return _section("decisions", "Decisions", tag("p", text, class_="empty"))
    by_hand = sum(one.is_by_hand for one in story.decisions)
    count = plural(len(story.decisions), "decision")
    lead = f"{count}, {by_hand} of them by hand." if by_hand else f"{count}."
    audits = tables.audit_summary(story.decisions)
    return _section(
        "decisions",
        "Decisions",
        tables.decision_table(story.decisions),
        lead=f"{lead} {audits}" if audits else lead,
    )


def _events(story: Story) -> Html | None:
    if not story.last_step:
        return None
    alarms = sum(event.is_alarm for event in story.events)
    source = (
        "The watcher saw every step as it trained."
        if story.saw_every_step
        else "Nobody watched while it trained: these were found in the logged steps, now."
    )
    if not story.events:
        text = f"Nothing was found. {source}"
        return _section("events", "Alarms and events", tag("p", text, class_="empty"))
    told = f"{plural(alarms, 'alarm')} among {plural(len(story.events), 'event')}. {source}"
    found = tables.event_table(story.events)
    if len(story.events) > 12:
        found = tag("details", tag("summary", "all of them"), found)
    return _section("events", "Alarms and events", found, lead=told)


def _forecast(story: Story) -> Html | None:
    seen = story.replay
    ahead = seen.forecast
    told = []
    if ahead is not None and ahead.step > ahead.at_step and math.isfinite(ahead.loss):
        told.append(
            f"From step {ahead.at_step:,} on, the training loss at step {ahead.step:,} is foretold "
            f"to be {figure(ahead.loss)}, with {ahead.level:.0%} between {figure(ahead.low)} and "
            f"{figure(ahead.high)}."
        )
    if seen.foretold:
        held = [one.is_inside for one in seen.foretold if one.is_inside is not None]
        told.append(
            "What the watcher, knowing only the steps until then, foretold of the smoothed "
            "training loss at the end of the budget."
            + (f" {sum(held)} of {len(held)} intervals held it." if held else "")
        )
    if not told:
        return None
    found = tables.forecast_table(seen.foretold) if seen.foretold else None
    title = "Forecast and what came" if not ahead else "Forecast"
    return _section("forecast", title, found, lead=" ".join(told))


# -- experts ---------------------------------------------------------------------------------------


def _experts(story: Story) -> Html | None:
    if not story.groups:
        return None
    scale = tag(
        "p",
        tag("span", "load over the even one", class_="entry quiet"),
        tag("span", "¼", tag("i", class_="ramp"), "4\u00d7", class_="entry"),
        tag("span", tag("i", class_="swatch dead"), "no token", class_="entry"),
        tag("span", tag("i", class_="swatch empty-slot"), "empty slot", class_="entry"),
        class_="legend",
    )
    groups = [_group(group) for group in story.groups]
    lead = "White is an even share. Left: over the steps, the mean of all layers. Right: every "
    lead += "layer, the first on top, over the last tenth of the logged steps."
    return _section("experts", "Load of experts", scale, groups, lead=lead)


def _group(group: GroupCourse) -> Html:
    steps = Span(float(group.steps[0]), float(group.steps[-1]))
    height = int(np.clip(6 * group.course.shape[1], 64, 260))
    told = [plural(group.num_experts, "expert")]
    if group.gini is not None:
        told.append(f"largest Gini at the end {figure(group.gini, 2)}")
    told.append(
        f"{group.num_dead} of {int(group.late_active.sum())} without a token in the last tenth"
        if group.num_dead
        else "none without a token in the last tenth"
    )
    return tag(
        "div",
        tag("h3", group.name, tag("small", f" {' · '.join(told)}")),
        tag(
            "div",
            _map(
                course_map(group.course, group.course_active),
                f"Load of the experts of {group.name} over steps",
                f"{height}px",
                "experts",
                step_axis(steps, step_ticks(steps)),
            ),
            _map(
                load_map(group.late, group.late_active),
                f"Load of the experts of {group.name} in every layer",
                f"{height}px",
                "layers",
                tag("div", tag("span", "experts", class_="unit"), class_="steps"),
            ),
            class_="maps",
        ),
        class_="group",
    )


def _map(picture: Picture, text: str, height: str, rows: str, below: Html) -> Html:
    source = base64.b64encode(picture.png).decode()
    return tag(
        "figure",
        tag("span", rows, class_="rows"),
        tag("img", src=f"data:image/png;base64,{source}", alt=text, style=f"height:{height}"),
        below,
        class_="map",
    )


# -- what it was made with -------------------------------------------------------------------------


def _samples(story: Story) -> Html | None:
    if not story.samples:
        return None
    return _section(
        "samples", "Samples", tables.samples_of(story.samples), lead="The prompt is in grey."
    )


def _configuration(story: Story) -> Html | None:
    if not story.config_text:
        return None
    whole = tag("details", tag("summary", "all of it"), tag("pre", story.config_text))
    changed = tables.settings_table(story.changed) if story.changed else None
    lead = f"{plural(len(story.changed), 'value')} set other than by default."
    return _section("configuration", "Configuration", changed, whole, lead=lead)


def _environment(story: Story) -> Html | None:
    parts = [
        tables.segment_table(story.segments) if story.segments else None,
        tables.manifest_table(story.manifest) if story.manifest else None,
    ]
    if parts == [None, None]:
        return None
    starts = plural(len(story.segments), "start") if story.segments else "Nothing known of starts"
    return _section("environment", "Environment", *parts, lead=f"{starts}; {state_of(story)}.")


# -- the pointer -----------------------------------------------------------------------------------


def _pointer_data(story: Story) -> dict[str, Any]:
    """What the script shows where the pointer is."""
    if not story.last_step:
        return {"span": [0, 0], "series": [], "phases": [], "marks": []}
    span = span_of(story)
    loss = story.curves["loss"]
    series = [
        _series("loss", "training loss", loss),
        _series("loss", "smoothed", smoothed(loss)),
        _series("loss", "validation loss", story.val_loss.finite),
        _series("lr", "learning rate", story.curves["lr"]),
        _series("grad_norm", "gradient norm", story.curves["grad_norm"]),
        _series("tokens_per_sec", "tokens/s", story.curves["tokens_per_sec"]),
    ]
    told = [[d.step, f"{d.number}. {d.action} ({d.rule})"] for d in story.decisions]
    told += [[e.step, f"{e.kind}, {e.severity}"] for e in story.events if e.is_alarm]
    return {
        "span": [span.first, span.last],
        "series": [one for one in series if one["steps"]],
        "phases": [[p.phase, p.from_step, p.to_step] for p in story.replay.phases],
        "marks": told[:2000],
    }


def _series(plot: str, label: str, curve: Series) -> dict[str, Any]:
    shown = thinned(curve, _POINTED)
    return {
        "plot": plot,
        "label": label,
        "steps": [round(float(step), 1) for step in shown.steps],
        "values": [float(f"{v:.5g}") if math.isfinite(v) else None for v in shown.values],
    }
