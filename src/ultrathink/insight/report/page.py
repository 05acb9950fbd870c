"""The page: one HTML file with its styles and script embedded, which loads nothing."""

from __future__ import annotations

import base64
import hashlib
import math
from importlib import resources
from typing import Any

from markupsafe import Markup

from ultrathink.insight.events import most_severe
from ultrathink.insight.report import marks, tables
from ultrathink.insight.report.charts import Chart, Line, Shape, Span, chart
from ultrathink.insight.report.curves import Series, at, smoothed, thinned
from ultrathink.insight.report.gathering import Story
from ultrathink.insight.report.headline import describe, state_of, tiles
from ultrathink.insight.report.markup import NOTHING, environment
from ultrathink.insight.report.settings import NONE
from ultrathink.monitoring.heat_map import Picture, course_map, load_map
from ultrathink.monitoring.jsonl import finite_number
from ultrathink.orchestrator.events import is_alarm

_POINTED = 1200  # points of a curve that the pointer can read
_FEW = 24  # points of a curve that are drawn one by one
_SMALL_CHARTS = {
    "lr": "Learning rate",
    "grad_norm": "Gradient norm, before clipping",
    "tokens_per_sec": "Tokens per second",
}


def render(story: Story) -> str:
    """The whole page as text."""
    style, script = (_part(name) for name in ("report.css", "report.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    audits = [one.audit for one in story.decisions if one.audit is not None]
    predicted = [(one.forecast.low, one.forecast.high, one.came) for one in story.replay.predicted]
    return (
        environment()
        .get_template("page.html")
        .render(
            story=story,
            style=Markup(style),
            script=Markup(script),
            script_hash=f"sha256-{digest}",
            state=state_of(story),
            description=describe(story),
            tiles=tiles(story),
            audit_axis=_reach(*(end for one in audits for end in (0.0, one.low, one.high))),
            forecast_axis=_reach(*(v for values in predicted for v in values if v is not None)),
            pointer=_pointer_data(story),
            marks=marks,
            tables=tables,
            NOTHING=NOTHING,
            NO_DEFAULT=NONE,
            Span=Span,
            course_map=course_map,
            data_url=data_url,
            finite_number=finite_number,
            most_severe=most_severe,
            is_alarm=is_alarm,
            load_map=load_map,
            **_course(story),
        )
    )


def _part(name: str) -> str:
    folder = resources.files("ultrathink.insight.report")
    return (folder / name).read_text(encoding="utf-8")


def data_url(picture: Picture) -> str:
    """The picture as the source of an ``img``: the page is one file and loads nothing."""
    return f"data:image/png;base64,{base64.b64encode(picture.png).decode()}"


def _reach(*values: float) -> Span | None:
    """The axis of intervals between ``values``, with a margin; None for none."""
    if not values:
        return None
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 1.0
    return Span(low - margin, high + margin)


# -- the course ------------------------------------------------------------------------------------


def _course(story: Story) -> dict[str, Any]:
    """Charts and marks; ``span`` is None where nothing was logged."""
    if not story.last_step:
        return {"span": None}
    span = span_of(story)
    return {
        "span": span,
        "loss": _loss_chart(story, span),
        "small_charts": [
            drawn
            for key, title in _SMALL_CHARTS.items()
            if (drawn := _small_chart(key, title, story.curves[key], span)) is not None
        ],
        "bands": [] if story.is_short else list(marks.bands(story.replay.phases, span)),
        "badges": marks.badges(story.decisions, span),
        "rail": marks.rail(story.events, span),
        "severities": marks.severities(story.events),
    }


def span_of(story: Story) -> Span:
    """From the first logged step to the last."""
    firsts = [records[0].step for records in (story.train, story.val) if records]
    return Span(float(min(firsts)), float(story.last_step))


def _small_chart(key: str, title: str, curve: Series, span: Span) -> Chart | None:
    drawn = [Line(key, "", curve, _shape(curve), is_raw=key != "lr")]
    if key != "lr" and len(smooth := smoothed(curve)):
        drawn = [Line(f"{key} faint", "", curve, is_raw=True), Line(key, "", smooth)]
    return chart(key, title, drawn, span, from_zero=True)


def _shape(curve: Series) -> Shape:
    return "joined dots" if len(curve) < _FEW else "line"


def _loss_chart(story: Story, span: Span) -> Chart | None:
    loss, val = story.curves["loss"], story.val_loss
    smooth = smoothed(loss)
    lines = [Line("raw", "training, each logged step", loss, _shape(loss), is_raw=True)]
    if len(smooth):
        lines.append(Line("smooth", "training, smoothed", smooth))
    if len(val.finite):
        lines.append(Line("val", "validation", val, "joined dots"))
    for number, part in enumerate(story.replay.undone):
        name = "undone by a rollback" if number == 0 else ""
        lines.insert(0, Line("undone", name, Series.of(part), is_aside=True))
    basis = smooth if len(smooth) else loss
    points = [(one.step, at(basis, one.step)) for one in story.decisions]
    placed = Series.of([(step, value) for step, value in points if value is not None])
    if len(placed) and len(story.decisions) <= marks.MANY:
        lines.append(Line("decision", "decision", placed, "dots"))
    return chart("loss", "Loss, nats per token", lines, span, has_switch=True)


# -- the pointer -----------------------------------------------------------------------------------


def _pointer_data(story: Story) -> dict[str, Any]:
    """The values that the script shows under the pointer."""
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
    named = [[d.step, f"{d.number}. {d.action} ({d.rule})"] for d in story.decisions]
    named += [[e.step, f"{e.kind}, {e.severity}"] for e in story.events if e.is_alarm]
    return {
        "span": [span.first, span.last],
        "series": [one for one in series if one["steps"]],
        "phases": [[p.phase, p.from_step, p.to_step] for p in story.replay.phases],
        "marks": named[:2000],
    }


def _series(plot: str, label: str, curve: Series) -> dict[str, Any]:
    shown = thinned(curve, _POINTED)
    return {
        "plot": plot,
        "label": label,
        "steps": [round(float(step), 1) for step in shown.steps],
        "values": [float(f"{v:.5g}") if math.isfinite(v) else None for v in shown.values],
    }
