"""metrics.jsonl and its like: strict lines, on the disk at once, cut when a run resumes."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from tests.unit.monitoring.disks import fill, small_disk
from tests.unit.monitoring.routed import with_loads
from ultrathink.monitoring import MetricRecord, RunInfo
from ultrathink.monitoring.experts import ExpertRecord
from ultrathink.monitoring.jsonl import JsonlSink, cut_after, read_lines


def opened(folder: Path, start_step: int = 0) -> JsonlSink:
    sink = JsonlSink()
    sink.open(RunInfo("a", folder, 100, start_step, ""))
    return sink


def record(step: int, split: str = "train", **values: float) -> MetricRecord:
    return MetricRecord(step, "val" if split == "val" else "train", float(step), values)


def experts(step: int) -> ExpertRecord:
    return ExpertRecord(step, float(step), with_loads([3.0, step], num_tokens=3 + step))


def read_records(path: Path) -> list[MetricRecord]:
    found = [MetricRecord.from_json(row) for _, row in read_lines(path) if row is not None]
    return [one for one in found if one is not None]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


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
    written = record(2, "val", loss=2.5, tokens=7)
    sink.write(written)
    sink.close()
    assert read_records(file)[2:] == [written]


@pytest.mark.parametrize("start", [0, 20])
def test_a_resumed_run_goes_on_after_its_checkpoint(start: int, tmp_path: Path) -> None:
    sink = opened(tmp_path)
    for step in (1, 10, 20, 21, 30):
        sink.write(record(step, loss=1.0))
        sink.experts(experts(step))
        sink.sample(step, "a", "b")
    sink.close()
    paths = [tmp_path / f"{name}.jsonl" for name in ("metrics", "experts", "samples")]
    for path in paths:
        path.write_bytes(path.read_bytes() + b'{"step": 31, "torn')
    resumed = opened(tmp_path, start_step=start)
    resumed.write(record(start + 1, loss=0.5))
    resumed.experts(experts(start + 1))
    resumed.sample(start + 1, "a", "b")
    resumed.close()
    for path in paths:
        steps = [line["step"] for line in lines_of(path)]
        assert steps == ([1, 10, 20, 21] if start else [1])
    assert lines_of(paths[1])[-1] == experts(start + 1).to_json()


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


def test_cutting_counts_what_went_and_keeps_what_has_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "decisions.jsonl"
    assert cut_after(path, 5) == 0
    assert not path.exists()
    path.write_text('{"note": 1}\n{"step": 5}\n{"step": 6}\n{"step": 4}\n{"step": 7}\n')
    assert cut_after(path, 5) == 2
    assert path.read_text() == '{"note": 1}\n{"step": 5}\n{"step": 4}\n'
    monkeypatch.setattr(os, "replace", lambda *_: pytest.fail("rewritten"))
    assert cut_after(path, 5) == 0  # nothing to cut leaves the file alone


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


# -- surroundings that break ----------------------------------------------------------------------


def test_a_resume_on_a_full_disk_cuts_and_writes_when_there_is_room(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        path = disk / "metrics.jsonl"
        sink = opened(disk)
        for step in range(1, 200):
            sink.write(record(step, loss=1.0))
        sink.close()
        filler = fill(disk)
        resumed = JsonlSink()
        with pytest.raises(OSError, match="No space left"):
            resumed.open(RunInfo("a", disk, 200, 150, ""))
        with pytest.raises(OSError, match="No space left"):
            resumed.write(record(151, loss=0.5))
        assert len(read_records(path)) == 199  # what lies beyond the checkpoint is still there
        filler.unlink()
        resumed.write(record(152, loss=0.5))
        resumed.close()
        assert [r.step for r in read_records(path)] == list(range(1, 153))


def test_both_files_are_tried_though_one_fails(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "metrics.jsonl").mkdir(parents=True)
    (folder / "samples.jsonl").mkdir()
    sink = opened(folder)
    with pytest.raises(IsADirectoryError):
        sink.write(record(1, loss=1.0))
    with pytest.raises(IsADirectoryError):
        sink.sample(1, "a", "b")
    (folder / "samples.jsonl").rmdir()
    with pytest.raises(IsADirectoryError):
        sink.close()
    assert json.loads((folder / "samples.jsonl").read_text())["text"] == "b"
    caught_up, lacking = (note for note, _ in sink.take_notes())
    assert "metrics.jsonl lacks 1 entry" in lacking + caught_up
    assert "samples.jsonl now has the 1 entry" in lacking + caught_up
