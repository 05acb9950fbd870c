"""Checkpoints of one mesh on another: every bit, the order of samples, the optimizer."""

import shutil
from pathlib import Path

import pytest

from tests.distributed import tasks
from tests.distributed.conftest import RunTask
from tests.distributed.pool import Pool
from tests.distributed.test_parity import assert_close, assert_equal, saved
from ultrathink.checkpoint.format import load_checkpoint, read_state
from ultrathink.checkpoint.snapshots import embedded_steps, snapshot_path
from ultrathink.runs.checking import check_run
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.inspection import consolidate, inspect_checkpoint
from ultrathink.runs.loading import load_model

HALF = (*tasks.EXPERTS, "training.max_steps=3", "training.precision=fp64")
STAGES = ["dp_replicate=2", "zero_stage=1", "zero_stage=2", "zero_stage=3"]
NOISE = "model.moe.routing={warmup_steps: 10, jitter: 0.1, expert_dropout: 0.1}"


@pytest.mark.parametrize("stage", STAGES)
def test_saved_by_two_it_loads_on_one_and_on_two(two: Pool, both: RunTask, stage: str) -> None:
    run, _ = both(tasks.train, *HALF, f"parallel.{stage}")
    on_disk = saved(run)
    assert_close(on_disk, tasks.loaded_state(run, "last", "parallel.dp_replicate=1"))
    for loaded in two.run(tasks.loaded_state, run):
        assert_close(on_disk, loaded)
    if stage == "dp_replicate=2":  # copies are written once
        contents = inspect_checkpoint(RunFolder(Path(run)).checkpoint("last"))
        assert {tensor.num_shards for tensor in contents.tensors} == {1}


def test_saved_by_one_it_loads_on_two_which_read_their_own_parts(two: Pool, alone: RunTask) -> None:
    run = alone(tasks.train, *HALF)
    for loaded in two.run(tasks.loaded_state, run):
        assert_close(saved(run), loaded)
    (first, whole), (second, _) = two.run(tasks.numbers_read, run)
    assert first + second == whole
    assert max(first, second) < 0.6 * whole


def test_a_resumed_run_of_two_is_the_run_that_continued(two: Pool, tmp_path: Path) -> None:
    """Dropout included: what is drawn depends on the step, not on what came before."""
    words = ("training.max_steps=6", "model.dropout=0.3", "training.checkpoint={every_steps: 3}")
    words = (*words, *tasks.EXPERTS, NOISE)
    whole, _ = two.run(tasks.train, str(tmp_path / "whole"), *words)
    half = str(tmp_path / "half" / Path(whole).name)
    shutil.copytree(whole, half, symlinks=True)
    shutil.rmtree(Path(half) / "checkpoints" / "step_00000006")
    two.run(tasks.resume, half)
    assert_close(saved(whole), saved(half))


@pytest.mark.parametrize("first", ["one", "two"])
def test_a_run_that_moves_between_meshes_takes_the_same_samples(
    two: Pool, alone: RunTask, tmp_path: Path, first: str
) -> None:
    words = ("training.max_steps=6", "training.precision=fp64", *tasks.EXPERTS)
    whole = alone(tasks.train, *words)
    moved = (*words, "training.checkpoint={every_steps: 3, keep: 9}")
    if first == "one":
        run = tasks.train(str(tmp_path), *moved)
    else:
        run, _ = two.run(tasks.train, str(tmp_path), *moved)
    shutil.rmtree(Path(run) / "checkpoints" / "step_00000006")
    remarks = two.run(tasks.resume, run)[0] if first == "one" else tasks.resume(run)
    there = "1 -> 2" if first == "one" else "2 -> 1"
    assert any(f"processes {there}" in text for text in remarks)
    assert_equal(whole, run, 1e-9)


BROKEN = ("training.precision=fp64", "training.checkpoint={every_steps: 26, keep: 9}")
ZERO_3 = "parallel.zero_stage=3"


def test_two_go_back_to_before_a_resume(two: Pool, both: RunTask) -> None:
    """Each wrote its own part of the snapshots; what an earlier checkpoint holds is linked."""
    whole, decided, skipped = both(tasks.train_and_break, *BROKEN, ZERO_3)[0]
    path, _ = both(tasks.train_and_stop, *BROKEN, ZERO_3)
    assert [one[1:] for one in two.run(tasks.resume_and_break, path)] == [(decided, skipped)] * 2
    [after] = [after for rule, _, after in decided if rule == "roll_back"]
    assert after == 101  # the checkpoint was of step 106
    assert_close(saved(whole), saved(path))
    for step in embedded_steps(read_state(Path(path) / "checkpoints" / "last")):
        snapshots = [
            snapshot_path(Path(one) / "checkpoints" / "last", step) for one in (whole, path)
        ]
        assert len(list(snapshots[0].glob("shard-00002-*"))) == 2
        assert_close(*(load_checkpoint(one)["model"] for one in snapshots))
    earlier = snapshot_path(Path(path) / "checkpoints" / "step_00000101", 101)
    assert {file.stat().st_nlink > 1 for file in earlier.iterdir()} == {True}
    assert check_run(RunFolder(Path(path))).is_sound


@pytest.mark.parametrize("first", ["one", "two"])
def test_snapshots_move_between_meshes(
    two: Pool, alone: RunTask, tmp_path: Path, first: str
) -> None:
    whole, decided, skipped = alone(tasks.train_and_break, *BROKEN)
    if first == "one":
        path = tasks.train_and_stop(str(tmp_path), *BROKEN)
        results = two.run(tasks.resume_and_break, path, ZERO_3)
    else:
        path, _ = two.run(tasks.train_and_stop, str(tmp_path), *BROKEN, ZERO_3)
        results = [tasks.resume_and_break(path)]
    for result in results:
        assert result[1:] == (decided, skipped)
    assert_equal(whole, path, 1e-9)


def test_what_two_wrote_is_listed_made_one_file_and_missed(two: Pool, tmp_path: Path) -> None:
    run, _ = two.run(tasks.train, str(tmp_path), "training.max_steps=2")
    folder = RunFolder(Path(run))
    last = folder.checkpoint("last")
    contents = inspect_checkpoint(last)
    assert contents.num_processes == 2
    shards = {tensor.name: tensor.num_shards for tensor in contents.tensors}
    assert shards["model/embedding.weight"] == 2
    target, remark = consolidate(folder, "last")
    assert (remark, sorted(path.name for path in target.iterdir())) == (
        "",
        ["config.yaml", "model.safetensors", "origins.yaml", "tokenizer"],
    )
    assert_close(load_model(run, "last")[0].state_dict(), load_model(target)[0].state_dict())
    missing = last.resolve() / "shard-00002-model-00001-of-00002.safetensors"
    missing.unlink()
    with pytest.raises(Exception, match=rf"{missing.name} is missing"):
        load_checkpoint(last)
    assert read_state(last)["progress"]["step"] == 2
