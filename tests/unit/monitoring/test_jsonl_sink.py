"""metrics.jsonl and samples.jsonl: strict lines, on the disk at once, cut when a run resumes."""

import json
import math
import os
from pathlib import Path

import pytest

from ultrathink.monitoring import MetricRecord, RunInfo
from ultrathink.monitoring.jsonl import JsonlSink, cut_after, read_records


def opened(folder: Path, start_step: int = 0) -> JsonlSink:
    sink = JsonlSink()
    sink.open(RunInfo("a", folder, 100, start_step, ""))
    return sink


def record(step: int, split: str = "train", **values: float) -> MetricRecord:
    return MetricRecord(step, "val" if split == "val" else "train", float(step), values)


def test_each_record_is_a_strict_line_on_the_disk_at_once(tmp_path: Path) -> None:
    sink = opened(tmp_path)
    file = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        sink.write(record(step, loss=math.nan))
        lines = file.read_text().splitlines()
        assert len(lines) == step
        assert "NaN" not in lines[-1]
        assert json.loads(lines[-1]) == {
            "step": step, "split": "train", "time": float(step), "loss": None,
        }  # fmt: skip
    sink.close()


def test_records_are_read_back(tmp_path: Path) -> None:
    sink = opened(tmp_path)
    records = [record(1, loss=2.0), record(1, "val", loss=2.5, tokens=7)]
    for each in records:
        sink.write(each)
    sink.close()
    assert read_records(tmp_path / "metrics.jsonl") == records


def test_a_resumed_run_goes_on_after_its_checkpoint(tmp_path: Path) -> None:
    sink = opened(tmp_path)
    for step in (1, 10, 20, 30):
        sink.write(record(step, loss=1.0))
    sink.write(record(20, "val", loss=1.0))
    sink.sample(20, "a", "b")
    sink.sample(30, "a", "b")
    sink.close()

    resumed = opened(tmp_path, start_step=20)
    resumed.write(record(21, loss=0.5))
    resumed.close()
    steps = [(r.step, r.split) for r in read_records(tmp_path / "metrics.jsonl")]
    assert steps == [(1, "train"), (10, "train"), (20, "train"), (20, "val"), (21, "train")]
    assert (tmp_path / "samples.jsonl").read_text().count("\n") == 1


def test_a_run_that_starts_over_forgets_its_steps(tmp_path: Path) -> None:
    sink = opened(tmp_path)
    sink.write(record(5, loss=1.0))
    sink.close()
    again = opened(tmp_path)
    again.write(record(1, loss=1.0))
    again.close()
    assert [r.step for r in read_records(tmp_path / "metrics.jsonl")] == [1]


@pytest.mark.parametrize(
    "torn", [b'{"step": 3, "lo', b'{"step": 3}', b"\0\0\0\n", b'{"t": "\xff"}\n', b"[3]\n"]
)
def test_a_line_that_a_crash_tore_is_dropped(torn: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = b'{"step": 1, "split": "train", "time": 0.0}\n'
    path.write_bytes(whole + torn)
    assert [r.step for r in read_records(path)] == [1]
    assert cut_after(path, 100) == 1
    assert path.read_bytes() == whole


def test_cutting_counts_what_went_and_keeps_what_has_no_step(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    path.write_text('{"note": 1}\n{"step": 5}\n{"step": 6}\n{"step": 4}\n{"step": 7}\n')
    assert cut_after(path, 5) == 2
    assert path.read_text() == '{"note": 1}\n{"step": 5}\n{"step": 4}\n'


def test_nothing_to_cut_leaves_the_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    assert cut_after(path, 5) == 0
    assert not path.exists()
    path.write_text('{"step": 5}\n')
    monkeypatch.setattr(os, "replace", lambda *_: pytest.fail("rewritten"))
    assert cut_after(path, 5) == 0


def test_a_crash_while_cutting_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5}\n{"step": 6}\n')

    def crash(*_: object) -> None:
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="power cut"):
        cut_after(path, 5)
    assert path.read_text() == '{"step": 5}\n{"step": 6}\n'


def test_samples_keep_any_text(tmp_path: Path) -> None:
    sink = opened(tmp_path)
    text = 'line\nbreak "quoted" \u2028 naïve \udc80'
    sink.sample(7, "def f(", text)
    sink.close()
    (line,) = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert json.loads(line) == {"step": 7, "prompt": "def f(", "text": text}
