"""Metric records: strict JSON, and back."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from tests.unit.monitoring.routed import with_loads
from ultrathink.monitoring import MetricRecord, RunInfo, Sink
from ultrathink.monitoring.experts import ExpertRecord


def test_a_record_is_one_flat_object() -> None:
    record = MetricRecord(3, "val", 12.5, {"loss": 1.5, "tokens": 7})
    assert record.to_json() == {"step": 3, "split": "val", "time": 12.5, "loss": 1.5, "tokens": 7}
    assert list(record.to_json())[:3] == ["step", "split", "time"]
    assert MetricRecord.from_json(record.to_json()) == record


def test_what_is_not_finite_becomes_null_and_is_read_back_as_nan() -> None:
    values = {"a": math.nan, "b": math.inf, "c": -math.inf}
    text = json.dumps(MetricRecord(1, "train", 0.0, values).to_json(), allow_nan=False)
    assert text.count("null") == 3
    back = MetricRecord.from_json(json.loads(text))
    assert back is not None
    assert all(math.isnan(value) for value in back.values.values())


def test_numbers_of_numpy_are_written_as_numbers() -> None:
    values = {"a": np.float32(0.5), "b": np.int64(2**40), "c": np.float64("nan")}
    text = json.dumps(MetricRecord(1, "train", 0.0, values).to_json(), allow_nan=False)
    assert json.loads(text) == {
        "step": 1, "split": "train", "time": 0.0, "a": 0.5, "b": 2**40, "c": None,
    }  # fmt: skip


def test_a_metric_cannot_take_the_place_of_the_step() -> None:
    with pytest.raises(AssertionError, match="'step' belongs to the record"):
        MetricRecord(1, "train", 0.0, {"step": 2})


def test_a_sink_takes_everything_and_does_nothing_unless_it_is_told_to(tmp_path: Path) -> None:
    sink = Sink()
    sink.open(RunInfo("a", tmp_path, 10, 0, ""))
    sink.set_total_steps(20)
    sink.progress(1)
    sink.write(MetricRecord(1, "train", 0.0))
    sink.experts(ExpertRecord(1, 0.0, with_loads([1.0], num_tokens=1)))
    sink.message("text", "info")
    sink.sample(1, "a", "b")
    assert sink.take_notes() == []
    sink.close()
    assert list(tmp_path.iterdir()) == []
