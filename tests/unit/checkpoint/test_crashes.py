"""A process that ends in the middle of a save, killed at every change to the disk."""

import os
from collections.abc import Iterator

import pytest

from tests.unit.checkpoint.crashing_writer import Writer, writer
from tests.unit.checkpoint.disks import hidden, state, value_of
from ultrathink.checkpoint.format import load_checkpoint, verify_checkpoint
from ultrathink.runs.folder import RunFolder

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


@pytest.fixture(scope="module")
def crashing() -> Iterator[Writer]:
    with writer() as driver:
        yield driver


def step_of(run: RunFolder, link: str) -> int:
    return int((run.checkpoints / link).resolve().name.removeprefix("step_"))


@pytest.mark.parametrize("step", [1, 2], ids=["the same step", "the next step"])
def test_killed_at_any_change_to_the_disk_a_run_has_what_it_had_or_the_new_one(
    run: RunFolder, crashing: Writer, step: int
) -> None:
    run.save(1, state(1), is_best=True, keep=1)
    crash_at, came_through, num_kept = 0, False, 0
    while not came_through:
        crash_at += 1
        before = value_of(load_checkpoint(run.step_path(1)))
        came_through = crashing.save(run, step, keep=1, crash_at=crash_at)
        for visible in run.steps():
            verify_checkpoint(run.step_path(visible))
        run.clean()
        assert hidden(run.path) == []
        newest = run.steps()[-1]
        value = value_of(load_checkpoint(run.step_path(newest)))
        assert value == 100 * step + crash_at or (newest == 1 and value == before)
        num_kept += value == before
        assert step_of(run, "last") == step_of(run, "best") == newest
        assert sorted(p.name for p in run.checkpoints.iterdir() if not p.is_symlink()) == [
            run.step_path(visible).name for visible in run.steps()
        ]
        if not came_through and newest == 2:  # once more from the beginning
            run.save(1, state(1), is_best=True, keep=9)
            run.remove_after(1)
    assert num_kept > 10
    assert crash_at > 20
    assert run.steps() == [step]
    assert value == 100 * step + crash_at


def test_what_a_crash_left_of_an_older_process_does_not_stop_a_save(run: RunFolder) -> None:
    """Without clean(), as where a checkpoint is saved by hand."""
    run.save(1, state(1), is_best=False, keep=2)
    for name in (".step_00000001.tmp", ".step_00000001.old", ".step_00000001.deleted"):
        (run.checkpoints / name).mkdir()
        (run.checkpoints / name / "state.json").write_text("{")
    run.save(1, state(2), is_best=False, keep=2)
    assert value_of(load_checkpoint(run.step_path(1))) == 2
    run.save(2, state(2), is_best=False, keep=1)
    assert run.steps() == [2]
