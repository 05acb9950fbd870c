"""The TensorBoard sink: what TensorBoard itself reads back."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest

from ultrathink.monitoring import MetricRecord, RunInfo
from ultrathink.monitoring.tensorboard import TensorBoardSink


def opened(folder: Path, start_step: int = 0) -> TensorBoardSink:
    sink = TensorBoardSink()
    sink.open(RunInfo("a", folder, 100, start_step, ""))
    return sink


def read(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder / "tensorboard"))
        events.Reload()
    return events


def test_scalars_have_split_name_step_and_time(tmp_path: Path) -> None:
    sink = opened(tmp_path)
    sink.write(MetricRecord(1, "train", 1000.0, {"loss": 2.0, "lr": 0.5}))
    sink.write(MetricRecord(2, "train", 1001.0, {"loss": math.nan}))
    sink.write(MetricRecord(2, "val", 1001.0, {"bits_per_byte": 1.25}))
    sink.close()
    events = read(tmp_path)
    assert set(events.Tags()["scalars"]) == {"train/loss", "train/lr", "val/bits_per_byte"}
    first, second = events.Scalars("train/loss")
    assert (first.step, first.wall_time, first.value) == (1, 1000.0, 2.0)
    assert math.isnan(second.value)
    assert events.Scalars("val/bits_per_byte")[0].value == 1.25


def test_a_resumed_run_hides_what_lay_beyond_its_checkpoint(tmp_path: Path) -> None:
    sink = opened(tmp_path)
    for step in (10, 20, 30):
        sink.write(MetricRecord(step, "train", float(step), {"loss": float(step)}))
    sink.close()
    resumed = opened(tmp_path, start_step=20)
    resumed.write(MetricRecord(25, "train", 99.0, {"loss": 0.5}))
    resumed.close()
    steps = [event.step for event in read(tmp_path).Scalars("train/loss")]
    assert steps == [10, 20, 25]


def test_samples_are_kept_word_for_word(tmp_path: Path) -> None:
    sink = opened(tmp_path)
    sink.sample(5, "def f(", "x):\n  *return* \udc80")
    sink.sample(5, "class ", "A")
    sink.sample(9, "def f(", "y)")
    sink.close()
    events = read(tmp_path)
    assert set(events.Tags()["tensors"]) == {
        "samples/1/text_summary",
        "samples/2/text_summary",
    }
    first, second = events.Tensors("samples/1/text_summary")
    assert first.tensor_proto.string_val[0] == b"    def f(x):\n      *return* ?"
    assert (first.step, second.step) == (5, 9)


def test_warnings_of_its_packages_stay_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils.tensorboard.writer import SummaryWriter

    def warn(*args: object, **options: object) -> None:
        warnings.warn("deprecated", DeprecationWarning, stacklevel=1)

    sink = opened(tmp_path)
    monkeypatch.setattr(SummaryWriter, "add_scalar", warn)
    sink.write(MetricRecord(1, "train", 0.0, {"loss": 1.0}))  # a warning is an error in tests
    sink.close()


def test_closing_twice_or_unopened_is_harmless(tmp_path: Path) -> None:
    TensorBoardSink().close()
    sink = opened(tmp_path)
    sink.close()
    sink.close()
