"""The table of changes: values, JSON, documentation."""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from tests.unit.training.all_changes import one_of_each
from ultrathink.core.errors import UltrathinkError
from ultrathink.training.change import Change
from ultrathink.training.changes import (
    CHANGES,
    AverageSnapshots,
    Pause,
    ReviveExperts,
    Rollback,
    ScaleLearningRate,
    SetActivationCheckpointing,
    SetClip,
    SetEvaluation,
    SetLearningRateFactor,
    SetMicroBatchSize,
    SetMixtureWeights,
    SetRouting,
    SetWeightDecay,
    SkipSamples,
    change_from,
)
from ultrathink.training.snapshots import Snapshot

DOCS = Path(__file__).parents[3] / "docs" / "steering.md"


def test_every_change_goes_through_json() -> None:
    for change in one_of_each(Snapshot(3, 0), Snapshot(5, 1)):
        sent = json.loads(json.dumps(change.to_json()))
        again = change_from(sent)
        assert type(again) is type(change)
        assert again.to_json() == change.to_json()
    back = change_from(Rollback(Snapshot(3, 7), skip_data=False).to_json())
    assert back == Rollback(Snapshot(3, 7), skip_data=False)


@pytest.mark.parametrize(
    ("make", "value", "message"),
    [
        (SetLearningRateFactor, 0.0, "factor must be a number above 0, not 0.0"),
        (lambda value: SetLearningRateFactor(0.5, value), 0, "over_steps must be a whole number"),
        (ScaleLearningRate, float("nan"), "scale must be a number above 0, not nan"),
        (SetClip, -1.0, "clip must be a number above 0, not -1.0"),
        (SetWeightDecay, -0.1, "weight_decay must be a number of 0 or above, not -0.1"),
        (SetMicroBatchSize, 0, "size must be a whole number above 0, not 0"),
        (SetMicroBatchSize, 1.5, "size must be a whole number above 0, not 1.5"),
        (SkipSamples, 0, "count must be a whole number above 0, not 0"),
        (SetEvaluation, 0, "every_steps must be a whole number above 0, not 0"),
        (Pause, float("inf"), "seconds must be a number above 0, not inf"),
        (SetMixtureWeights, [0.0], "weights must be numbers of 0 or above, one above it"),
        (AverageSnapshots, [], "snapshots must be one or more"),
        (ReviveExperts, [{"layer": 1}], "experts must each have `layer`, `group` and `expert`"),
        (SetActivationCheckpointing, "ful", "full"),
        (lambda value: SetRouting("jitter", value), 7.0, "jitter"),
    ],
)
def test_nonsense_is_refused_when_it_is_made(
    make: Callable[[Any], Change], value: Any, message: str
) -> None:
    with pytest.raises(UltrathinkError, match=message):
        make(value)


def test_the_documentation_has_each_change_and_its_values() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for kind in CHANGES:
        arguments = ", ".join(field.name for field in fields(kind))
        says = " ".join((kind.__doc__ or "").split())
        assert f"| `{kind.__name__}({arguments})` | {says} |" in text
    assert text.count("\n| `Set") == sum(kind.__name__.startswith("Set") for kind in CHANGES)
