"""The head of the page: what the run is, and what it came to."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ultrathink.insight.report.gathering import Story
from ultrathink.insight.report.markup import (
    NOTHING,
    Content,
    Html,
    duration,
    figure,
    html,
    moment,
    plural,
    tag,
)
from ultrathink.monitoring.records import MetricRecord
from ultrathink.monitoring.wording import short_number

_LATE = 0.1  # of the steps, that the training loss is the mean of


def headline(story: Story) -> Html:
    """Name, state, and the figures that everybody asks for first."""
    tiles = [
        _bits_per_byte(story),
        _validation(story),
        _training(story),
        _tokens(story),
        _time(story),
        _happenings(story),
    ]
    state = story.summary.state
    return tag(
        "header",
        tag("h1", story.name, tag("span", state, class_=f"state st-{state}")),
        tag("p", _described(story), class_="lead"),
        tag("dl", [tile for tile in tiles if tile is not None], class_="tiles"),
    )


def state_of(story: Story) -> str:
    """Where the run stands, in words."""
    total, last = story.summary.total_steps, story.summary.step or story.last_step
    at = f"step {last:,}" + (f" of {total:,}" if total else "")
    return {
        "running": f"still training, at {at} when this page was made",
        "finished": f"finished at {at}",
        "stopped": f"stopped at {at}; it can be resumed",
        "empty": f"at {at}, without a checkpoint yet" if last else "without a checkpoint yet",
        "damaged": f"damaged, at {at}",
    }[story.summary.state]


def _described(story: Story) -> str:
    parts = []
    parameters = story.manifest.get("num_parameters")
    if isinstance(parameters, int):
        parts.append(f"{short_number(parameters)} parameters")
    model = story.config.get("model")
    if isinstance(model, dict):
        shape = [f"{model.get('num_layers')} layers", f"width {model.get('hidden_size')}"]
        if isinstance(model.get("moe"), dict) and story.groups:
            shape.append(plural(len(story.groups), "group") + " of experts")
        parts.append(", ".join(shape))
    if story.segments:
        device = story.segments[-1].environment.get("device")
        precision = story.segments[-1].environment.get("precision")
        if device:
            parts.append(f"{precision} on {device}" if precision else str(device))
        parts.append(f"begun {moment(story.segments[0].time)}")
        if len(story.segments) > 1:
            parts.append(f"resumed {plural(len(story.segments) - 1, 'time')}")
    parts.append(state_of(story))
    return " · ".join(parts)


def _tile(title: str, value: str, *small: Content, kind: str = "") -> Html:
    return tag(
        "div",
        tag("dt", title),
        tag("dd", value, class_="value"),
        [tag("dd", text, class_="small") for text in small if text],
        class_=f"tile {kind}".strip(),
    )


def _bits_per_byte(story: Story) -> Html | None:
    found = _finite(story.val, "bits_per_byte")
    if not found:
        return None
    step, value = found[-1]
    return _tile("Bits per byte", figure(value), _best(found) or f"held out, step {step:,}")


def _validation(story: Story) -> Html | None:
    found = _finite(story.val, "loss")
    if not found:
        return None
    step, value = found[-1]
    ppl = f"perplexity {figure(math.exp(value), 3)}" if value < 20 else None
    return _tile("Validation loss", figure(value), ppl or f"step {step:,}")


def _training(story: Story) -> Html | None:
    found = _finite(story.train, "loss")
    if not found:
        return _tile("Training loss", NOTHING, "nothing logged yet")
    late = [loss for step, loss in found if step > (1 - _LATE) * story.last_step] or [found[-1][1]]
    return _tile("Training loss", figure(math.fsum(late) / len(late)), "mean of the last tenth")


def _tokens(story: Story) -> Html | None:
    found = _finite(story.train, "tokens")
    if not found:
        return None
    steps = f"{story.last_step:,} steps"
    total = story.summary.total_steps
    if total and total > story.last_step:
        steps = f"{story.last_step:,} of {total:,} steps"
    return _tile("Tokens", short_number(found[-1][1]), steps)


def _time(story: Story) -> Html | None:
    if story.elapsed_s is None:
        return None
    speeds = sorted(speed for _, speed in _finite(story.train, "tokens_per_sec"))
    speed = f"{short_number(speeds[len(speeds) // 2])} tokens/s, median" if speeds else None
    return _tile("Training time", duration(story.elapsed_s), speed)


def _happenings(story: Story) -> Html:
    alarms = sum(event.is_alarm for event in story.events)
    words = plural(alarms, "alarm") if alarms else "no alarm"
    proven = sum(one.audit is not None and one.audit.verdict == "helped" for one in story.decisions)
    return _tile(
        "Decisions",
        f"{len(story.decisions):,}",
        html(words, f", {proven} proven to help" if proven else None),
    )


def _best(found: Sequence[tuple[int, float]]) -> str | None:
    """The best value, where that is not the last."""
    step, value = min(found, key=lambda point: point[1])
    return f"best {figure(value)}, step {step:,}" if value < found[-1][1] else None


def _finite(records: Sequence[MetricRecord], name: str) -> list[tuple[int, float]]:
    return [
        (record.step, value)
        for record in records
        if math.isfinite(value := record.values.get(name, math.nan))
    ]
