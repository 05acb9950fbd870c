"""The report as one JSON object, without the curves, which are in metrics.jsonl."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pydantic_core import to_jsonable_python

from ultrathink.insight.report.gathering import Story


def to_json(story: Story) -> dict[str, Any]:
    """Headline figures, decisions, events, phases, forecasts and notes; null for no number."""
    summary, ahead = story.summary, story.replay.forecast
    found: dict[str, Any] = {
        "run": story.name,
        "state": summary.state,
        "step": story.last_step or summary.step,
        "total_steps": summary.total_steps,
        "tokens": story.train[-1].values.get("tokens") if story.train else None,
        "train_loss": summary.train_loss,
        "val_loss": summary.val_loss,
        "bits_per_byte": summary.bits_per_byte,
        "elapsed_s": story.elapsed_s,
        "decisions": [
            {**asdict(one), "audit": one.audit.to_json() if one.audit else None}
            for one in story.decisions
        ],
        "events": [event.to_json() for event in story.events],
        "phases": [phase.to_json() for phase in story.replay.phases],
        "forecast": ahead.to_json() if ahead is not None else None,
        "forecasts": [
            {
                "share": one.share,
                **one.forecast.to_json(),
                "came": one.came,
                "is_inside": one.is_inside,
            }
            for one in story.replay.predicted
        ],
        "experts": [
            {
                "group": group.name,
                "num_experts": group.num_experts,
                "gini": group.gini,
                "num_without_tokens": group.num_dead,
            }
            for group in story.groups
        ],
        "starts": len(story.segments),
        "changed_settings": {one.key: one.value for one in story.changed},
        "notes": story.notes,
    }
    plain: dict[str, Any] = to_jsonable_python(found, inf_nan_mode="null")
    return plain
