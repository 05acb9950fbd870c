"""The table of changes: values, JSON, documentation."""

import json
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.unit.training.all_changes import one_of_each
from ultrathink.core.errors import UltrathinkError
from ultrathink.training import changes
from ultrathink.training.change import Change
from ultrathink.training.changes import CHANGES
from ultrathink.training.snapshots import Snapshot

DOCS = Path(__file__).parents[3] / "docs" / "steering.md"


def test_every_change_goes_through_json() -> None:
    for change in one_of_each(Snapshot(3, 0), Snapshot(5, 1)):
        sent = json.loads(json.dumps(change.to_json()))
        again = changes.change_from(sent)
        assert type(again) is type(change)
        assert again.to_json() == change.to_json()
    back = changes.change_from(changes.Rollback(Snapshot(3, 7), skip_data=False).to_json())
    assert back == changes.Rollback(Snapshot(3, 7), skip_data=False)


@pytest.mark.parametrize(
    ("make", "value", "message"),
    [
        (changes.SetLearningRateFactor, 0.0, "factor must be a number above 0, not 0.0"),
        (partial(changes.SetLearningRateFactor, 0.5), 0, "over_steps must be a whole number"),
        (changes.ScaleLearningRate, float("nan"), "scale must be a number above 0, not nan"),
        (changes.SetWeightDecay, -0.1, "weight_decay must be a number of 0 or above, not -0.1"),
        (changes.SetMicroBatchSize, 1.5, "size must be a whole number above 0, not 1.5"),
        (changes.Pause, float("inf"), "seconds must be a number above 0, not inf"),
        (changes.SetMixtureWeights, [0.0], "weights must be .* 0 or above, at least one above 0"),
        (changes.AverageSnapshots, [], "snapshots must be one or more"),
        (changes.ReviveExperts, [{"layer": 1}], "experts must each have `layer`, `group` and"),
        (changes.SetActivationCheckpointing, "ful", "full"),
        (changes.AdjustModCapacity, 0, r"depth routing must be a share above 0, up to 1, not 0"),
        (partial(changes.SetRouting, "jitter"), 1.5, r"jitter must be 0 or more and below 1, not"),
        (lambda name: changes.SetRouting(name, 1.0), "temprature", "Did you mean 'temperature'"),
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
