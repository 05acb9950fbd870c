"""The list of runs: the state of each, its figures, and what is wrong with it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.unit.runs.trained_runs import make_run, train_line, val_line, write_lines
from ultrathink.core.errors import UltrathinkError
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.listing import RunSummary, list_runs, size_on_disk, summarize
from ultrathink.runs.lock import RunLock


def at_its_end(state: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    return bool(state["progress"]["step"] >= config["training"]["max_steps"])


def summary(run: RunFolder) -> RunSummary:
    return summarize(run, at_its_end)


def test_a_run_is_empty_then_stopped_then_finished(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert (summary(run).state, summary(run).checkpoints) == ("empty", ())
    other = make_run(tmp_path, saved=[5, 10])
    assert (summary(other).state, summary(other).checkpoints) == ("stopped", (5, 10))
    third = make_run(tmp_path, saved=[5, 20])
    assert summary(third).state == "finished"
    assert [summary(r).problem for r in (run, other, third)] == [None] * 3
    with RunLock.acquire(third):
        found = summary(third)
        assert found.state == "running"
        assert found.owner is not None
        assert found.owner.pid == os.getpid()
    config = third.path / "config.yaml"  # resumed with a greater length, and died at once
    config.write_text(config.read_text().replace("max_steps: 20", "max_steps: 40"))
    assert (summary(third).state, summary(third).total_steps) == ("stopped", 40)
    config.write_text(config.read_text().replace("max_steps: 40", "max_steps: null"))
    assert summarize(third, lambda state, config: False).total_steps == 20  # the checkpoint's


def test_figures_are_the_last_ones(tmp_path: Path) -> None:
    run = make_run(tmp_path, saved=[10], total=30)
    found = summary(run)
    assert (found.step, found.total_steps) == (10, 30)
    assert (found.train_loss, found.val_loss, found.bits_per_byte) == (None, None, None)
    lines = [train_line(1, 5.0), val_line(10, 4.0), train_line(20, 3.0), '{"step": 30, "spl']
    write_lines(run.metrics, lines)
    found = summary(run)
    assert (found.step, found.total_steps) == (20, 30)
    assert (found.train_loss, found.val_loss, found.bits_per_byte) == (3.0, 4.0, 2.0)
    run.metrics.unlink()
    run.metrics.mkdir()
    found = summary(run)
    assert (found.state, found.problem) == (
        "stopped",
        "metrics.jsonl cannot be read: Is a directory",
    )
    run.metrics.rmdir()
    run.save(10, {"progress": None}, is_best=False, keep=1)
    found = summary(run)
    assert (found.state, found.problem) == ("damaged", "its last checkpoint has no progress")


LAST = "checkpoints/step_00000010"


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        (f"{LAST}/*.safetensors", "cut", f"{LAST} is incomplete"),
        (f"{LAST}/state.json", "{", f"{LAST} is damaged: state.json cannot be read"),
        (f"{LAST}/state.json", None, f"{LAST} is not a checkpoint: it has no state.json"),
        (f"{LAST}/checksums.json", None, f"{LAST} is incomplete"),
        ("config.yaml", None, "config.yaml is missing"),
        ("config.yaml", "training: [", "config.yaml is damaged"),
        ("config.yaml", "model: {}\n", "config.yaml has no section training"),
    ],
)
def test_damage_is_said(tmp_path: Path, name: str, content: str | None, problem: str) -> None:
    run = make_run(tmp_path, saved=[5, 10])
    [path] = run.path.glob(name)
    path.unlink() if content is None else path.write_text(content)
    found = summary(run)
    assert found.state == "damaged"
    assert found.problem is not None
    assert found.problem.removeprefix("checkpoint ").startswith(problem)
    assert [r.name for r in list_runs(tmp_path, at_its_end)] == ["debug"]


def test_the_newest_change_comes_first(tmp_path: Path) -> None:
    for number, name in enumerate(("c", "a", "b")):
        run = make_run(tmp_path, name)
        write_lines(run.metrics, [train_line(1, 5.0)])
        for path in (run.checkpoints, run.path / "config.yaml"):
            os.utime(path, (0, 0))
        os.utime(run.metrics, (100 + number, 100 + number))
    make_run(tmp_path, "gone").path.rename(tmp_path / ".trash")  # and what is no run
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes.txt").write_text("...")
    found = list_runs(tmp_path, at_its_end)
    assert [run.name for run in found] == ["b", "a", "c"]
    assert [run.changed for run in found] == [102, 101, 100]


def test_a_folder_that_is_not_there_or_is_a_run(tmp_path: Path) -> None:
    with pytest.raises(UltrathinkError, match=r"there is no folder .*nowhere\. Runs are in"):
        list_runs(tmp_path / "nowhere", at_its_end)
    run = make_run(tmp_path)
    with pytest.raises(UltrathinkError, match=r"is a run itself.*: ultrathink runs check "):
        list_runs(run.path, at_its_end)


def test_the_size_is_that_of_all_files_and_of_no_link(tmp_path: Path) -> None:
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    (tmp_path / "a").write_bytes(bytes(100))
    (tmp_path / "deep" / "deeper" / "b").write_bytes(bytes(1000))
    (tmp_path / "link").symlink_to("deep", target_is_directory=True)
    assert size_on_disk(tmp_path) == 1100 + len("deep")
    assert size_on_disk(tmp_path / "nowhere") == 0
