"""The TensorBoard sink: what TensorBoard itself reads back."""

import importlib
import math
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.unit.monitoring.routed import routed, statistics
from ultrathink.monitoring import MetricRecord, RunInfo
from ultrathink.monitoring.experts import ExpertRecord
from ultrathink.monitoring.heat_map import load_map
from ultrathink.monitoring.tensorboard import TensorBoardSink


def opened(folder: Path, start_step: int = 0) -> TensorBoardSink:
    sink = TensorBoardSink()
    sink.open(RunInfo("a", folder, 100, start_step, ""))
    return sink


def read(folder: Path, how: str = "event_accumulator") -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reader = importlib.import_module(f"tensorboard.backend.event_processing.{how}")

        events = reader.EventAccumulator(str(folder / "tensorboard"))
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


def test_samples_are_kept_word_for_word(tmp_path: Path) -> None:
    sink = opened(tmp_path)
    sink.sample(5, "def f(", "x):\n  *return* \udc80")
    sink.sample(5, "class ", "A")
    sink.sample(9, "def f(", "y)")
    sink.close()
    events = read(tmp_path)
    assert set(events.Tags()["tensors"]) == {"samples/1", "samples/2"}
    assert events.SummaryMetadata("samples/1").plugin_data.plugin_name == "text"
    first, second = events.Tensors("samples/1")
    assert first.tensor_proto.string_val[0] == b"    def f(x):\n      *return* ?"
    assert (first.step, second.step) == (5, 9)


def test_experts_have_scalars_of_each_layer_and_a_picture_of_each_group(tmp_path: Path) -> None:
    layers = [{"skill": routed(seed, 8, 2, 60), "meta": routed(seed, 4, 1, 60)} for seed in (1, 2)]
    given = statistics(*layers)
    sink = opened(tmp_path)
    sink.experts(ExpertRecord(10, 1000.0, given))
    sink.close()
    events = read(tmp_path)
    for group, figures in given.figures.items():
        for name, values in figures.items():
            for layer, value in zip((1, 3), values.tolist(), strict=True):
                (scalar,) = events.Scalars(f"experts/{group}/{name}/layer_{layer}")
                assert scalar.value == pytest.approx(value, rel=1e-6)
                assert (scalar.step, scalar.wall_time) == (10, 1000.0)
    assert len(events.Tags()["scalars"]) == 2 * 2 * len(given.figures["skill"])
    assert events.Tags()["tensors"] == ["experts/skill/load", "experts/meta/load"]
    for group in given.groups:
        tag = f"experts/{group.name}/load"
        (image,) = events.Tensors(tag)
        expected = load_map(given.load[:, group.slots], given.active[:, group.slots])
        width, height, png = image.tensor_proto.string_val
        assert png == expected.png
        assert (int(width), int(height)) == (expected.width, expected.height)
        assert image.step == 10
        about = events.SummaryMetadata(tag)
        assert about.plugin_data.plugin_name == "images"
        assert "White: 1." in about.summary_description


def test_warnings_of_its_packages_stay_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    write = RecordWriter.write

    def warn(*args: Any) -> None:
        warnings.warn("deprecated", DeprecationWarning, stacklevel=1)
        write(*args)

    monkeypatch.setattr(RecordWriter, "write", warn)
    sink = opened(tmp_path)
    sink.write(MetricRecord(1, "train", 0.0, {"loss": 1.0}))  # a warning is an error in tests
    sink.sample(1, "a", "b")
    sink.close()
    assert len(read(tmp_path).Scalars("train/loss")) == 1


def test_figures_are_on_the_disk_at_once_and_no_thread_is_started(tmp_path: Path) -> None:
    TensorBoardSink().close()  # unopened
    num_threads = threading.active_count()
    sink = opened(tmp_path)
    sink.write(loss_record(1))
    assert threading.active_count() == num_threads
    assert steps(tmp_path) == [1]
    sink.close()
    sink.close()


# -- surroundings that break ----------------------------------------------------------------------


def loss_record(step: int) -> MetricRecord:
    values = {f"figure_{number}": 1.0 for number in range(9)}
    return MetricRecord(step, "train", float(step), {"loss": float(step), **values})


def steps(folder: Path) -> list[int]:
    return [event.step for event in read(folder).Scalars("train/loss")]


def test_a_resumed_run_hides_what_lay_beyond_its_checkpoint(tmp_path: Path) -> None:
    """Also where its event file vanishes, and it begins another."""
    first = opened(tmp_path)
    for step in (10, 20, 30):
        first.write(loss_record(step))
    first.close()
    (old,) = (tmp_path / "tensorboard").iterdir()
    resumed = opened(tmp_path, start_step=20)
    resumed.write(loss_record(25))
    assert steps(tmp_path) == [10, 20, 25]
    (new,) = [file for file in (tmp_path / "tensorboard").iterdir() if file != old]
    new.unlink()
    resumed.write(loss_record(40))
    resumed.close()
    assert steps(tmp_path) == [10, 20, 40]
