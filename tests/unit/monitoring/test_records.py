"""Metric records: strict JSON, and back."""

import json
import math

import numpy as np
import pytest

from ultrathink.monitoring import MetricRecord


def test_a_record_is_one_flat_object_of_strict_json_and_is_read_back() -> None:
    record = MetricRecord(3, "val", 12.5, {"loss": 1.5, "tokens": 7})
    assert record.to_json() == {"step": 3, "split": "val", "time": 12.5, "loss": 1.5, "tokens": 7}
    assert list(record.to_json())[:3] == ["step", "split", "time"]
    assert MetricRecord.from_json(record.to_json()) == record


def test_what_is_not_finite_becomes_null_and_is_read_back_as_nan() -> None:
    bad = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": np.float64("nan")}
    numbers = {"e": np.float32(0.5), "f": np.int64(2**40)}  # NumPy's are numbers, too
    text = json.dumps(MetricRecord(1, "train", 0.0, bad | numbers).to_json(), allow_nan=False)
    assert text.count("null") == 4
    back = MetricRecord.from_json(json.loads(text))
    assert back is not None
    assert all(math.isnan(back.values.pop(name)) for name in bad)
    assert back.values == {"e": 0.5, "f": 2**40}


def test_a_metric_cannot_take_the_place_of_the_step() -> None:
    with pytest.raises(AssertionError, match="'step' belongs to the record"):
        MetricRecord(1, "train", 0.0, {"step": 2})
