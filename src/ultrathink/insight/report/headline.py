"""The head of the page: what the run is, and its main results."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ultrathink.insight.comparison import finite, loss_of_last_tenth, median_speed
from ultrathink.insight.report.gathering import Story
from ultrathink.insight.report.markup import figure, moment, plural
from ultrathink.monitoring.wording import short_number, short_time

Tile = tuple[str, str, str]  # a title, its figure, and a remark


def state_of(story: Story) -> str:
    """Where the run stands, in words."""
    total, last = story.summary.total_steps, story.summary.step or story.last_step
    at = f"step {last:,}" + (f" of {total:,}" if total else "")
    return {
        "running": f"training, at {at} when this page was written",
        "finished": f"finished at {at}",
        "stopped": f"stopped at {at}; it can be resumed",
        "empty": f"at {at}, without a checkpoint yet" if last else "without a checkpoint yet",
        "damaged": f"damaged, at {at}",
    }[story.summary.state]


def describe(story: Story) -> str:
    """The run in a line: its size, its hardware and its state."""
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
        parts.append(f"started {moment(story.segments[0].time)}")
        if len(story.segments) > 1:
            parts.append(f"resumed {plural(len(story.segments) - 1, 'time')}")
    parts.append(state_of(story))
    return " · ".join(parts)


def tiles(story: Story) -> Iterator[Tile]:
    """The main figures."""
    last = story.last_step
    if found := finite(story.val, "bits_per_byte"):
        (step, value), (best_step, best) = found[-1], min(found, key=lambda point: point[1])
        remark = f"best {figure(best)}, step {best_step:,}"
        yield (
            "Bits per byte",
            figure(value),
            remark if best < value else f"held out, step {step:,}",
        )
    if found := finite(story.val, "loss"):
        step, value = found[-1]
        ppl = f"perplexity {figure(math.exp(value), 3)}" if value < 20 else f"step {step:,}"
        yield "Validation loss", figure(value), ppl
    loss = loss_of_last_tenth(story.train)
    remark = "mean of the last tenth" if loss is not None else "nothing logged yet"
    yield "Training loss", figure(loss), remark
    if found := finite(story.train, "tokens"):
        total = story.summary.total_steps
        steps = f"{last:,} of {total:,} steps" if total and total > last else f"{last:,} steps"
        yield "Tokens", short_number(found[-1][1]), steps
    if story.elapsed_s is not None:
        speed = median_speed(story.train)
        remark = f"{short_number(speed)} tokens/s, median" if speed is not None else ""
        yield "Training time", short_time(story.elapsed_s), remark
    alarms = sum(event.is_alarm for event in story.events)
    proven = sum(one.audit is not None and one.audit.verdict == "helped" for one in story.decisions)
    words = plural(alarms, "alarm") if alarms else "no alarm"
    helped = f", {proven} proven to help" if proven else ""
    yield "Decisions", f"{len(story.decisions):,}", words + helped
