"""Checkpoints of one mesh on another: every bit, the order of samples, the optimizer."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed import tasks
from tests.distributed.pool import Pool
from tests.distributed.test_parity import assert_equal
from ultrathink.checkpoint.format import load_checkpoint, read_state
from ultrathink.checkpoint.snapshots import embedded_steps, snapshot_path
from ultrathink.runs.checking import check_run
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.inspection import consolidate, inspect_checkpoint
from ultrathink.runs.loading import load_model

HALF = ("training.max_steps=3", "training.precision=fp64")
STAGES = {
    "ddp": "parallel.dp_replicate=2",
    **{f"zero {n}": f"parallel.zero_stage={n}" for n in (1, 2, 3)},
}
NOISE = "model.moe.routing={warmup_steps: 10, jitter: 0.1, expert_dropout: 0.1}"
EXPERTS = {"dense": (), "experts": tasks.EXPERTS}


def saved(run: str) -> dict[str, Any]:
    """The tensors of the last checkpoint as one process reads them."""
    state: Any = load_checkpoint(Path(run) / "checkpoints" / "last")
    return {"model": state["model"], "optimizer": state["optimizer"], "data": state["data"]}


def assert_same_bits(here: Any, there: Any, path: str = "") -> None:
    if isinstance(here, dict):
        assert set(here) == set(there), path
        for key in here:
            assert_same_bits(here[key], there[key], f"{path}/{key}")
    elif hasattr(here, "shape"):
        np.testing.assert_array_equal(np.asarray(here), np.asarray(there), err_msg=path)
    else:
        assert here == there, path


@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize("stage", STAGES)
def test_saved_by_two_it_loads_on_one_and_on_two(
    two: Pool, tmp_path: Path, stage: str, kind: str
) -> None:
    run, _ = two.run(tasks.train, str(tmp_path), *HALF, *EXPERTS[kind], STAGES[stage])
    on_disk = saved(run)
    assert_same_bits(on_disk, tasks.loaded_state(run, "last", "parallel.dp_replicate=1"))
    for loaded in two.run(tasks.loaded_state, run):
        assert_same_bits(on_disk, loaded)


def test_copies_of_the_model_are_written_once(two: Pool, tmp_path: Path) -> None:
    run, _ = two.run(tasks.train, str(tmp_path), *HALF, STAGES["ddp"])
    contents = inspect_checkpoint(RunFolder(Path(run)).checkpoint("last"))
    assert {tensor.num_shards for tensor in contents.tensors} == {1}


@pytest.mark.parametrize("kind", EXPERTS)
def test_a_resumed_run_of_two_is_the_run_that_continued(
    two: Pool, tmp_path: Path, kind: str
) -> None:
    """Dropout included: what is drawn depends on the step, not on what came before."""
    words = ("training.max_steps=6", "model.dropout=0.3", "training.checkpoint={every_steps: 3}")
    words = (*words, *EXPERTS[kind], *(() if kind == "dense" else (NOISE,)))
    whole, _ = two.run(tasks.train, str(tmp_path / "whole"), *words)
    half, _ = two.run(tasks.train, str(tmp_path / "half"), *words)
    shutil.rmtree(Path(half) / "checkpoints" / "step_00000006")
    two.run(tasks.resume, half)
    assert_same_bits(saved(whole), saved(half))


@pytest.mark.parametrize("kind", EXPERTS)
def test_saved_by_one_it_loads_on_two(two: Pool, tmp_path: Path, kind: str) -> None:
    run = tasks.train(str(tmp_path), *HALF, *EXPERTS[kind])
    for loaded in two.run(tasks.loaded_state, run):
        assert_same_bits(saved(run), loaded)


@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize("first", ["one", "two"])
def test_a_run_that_moves_between_meshes_takes_the_same_samples(
    two: Pool, tmp_path: Path, first: str, kind: str
) -> None:
    words = ("training.max_steps=6", "training.precision=fp64", *EXPERTS[kind])
    whole = tasks.train(str(tmp_path / "whole"), *words)
    moved = (*words, "training.checkpoint={every_steps: 3, keep: 9}")
    if first == "one":
        run = tasks.train(str(tmp_path / "moved"), *moved)
    else:
        run, _ = two.run(tasks.train, str(tmp_path / "moved"), *moved)
    shutil.rmtree(Path(run) / "checkpoints" / "step_00000006")
    if first == "one":
        remarks, _ = two.run(tasks.resume, run)
        assert any("processes 1 -> 2" in text for text in remarks)
    else:
        assert any("processes 2 -> 1" in text for text in tasks.resume(run))
    assert_equal(whole, run, 1e-9)


def test_two_go_back_to_before_a_resume(two: Pool, tmp_path: Path) -> None:
    """Each wrote its own part of the snapshots; what an earlier checkpoint holds is linked."""
    words = ("parallel.zero_stage=3", "training.checkpoint={every_steps: 26, keep: 9}")
    whole, decided, skipped = two.run(tasks.train_and_break, str(tmp_path / "whole"), *words)[0]
    path, _ = two.run(tasks.train_and_stop, str(tmp_path / "stopped"), *words)
    assert [one[1:] for one in two.run(tasks.resume_and_break, path)] == [(decided, skipped)] * 2
    [after] = [after for rule, _, after in decided if rule == "roll_back"]
    assert after == 101  # the checkpoint was of step 106
    assert_same_bits(saved(whole), saved(path))
    for step in embedded_steps(read_state(Path(path) / "checkpoints" / "last")):
        snapshots = [
            snapshot_path(Path(one) / "checkpoints" / "last", step) for one in (whole, path)
        ]
        assert len(list(snapshots[0].glob("shard-00002-*"))) == 2
        assert_same_bits(
            load_checkpoint(snapshots[0])["model"], load_checkpoint(snapshots[1])["model"]
        )
    earlier = snapshot_path(Path(path) / "checkpoints" / "step_00000101", 101)
    assert {file.stat().st_nlink > 1 for file in earlier.iterdir()} == {True}
    assert check_run(RunFolder(Path(path))).is_sound


@pytest.mark.parametrize("first", ["one", "two"])
def test_snapshots_move_between_meshes(two: Pool, tmp_path: Path, first: str) -> None:
    words = ("training.precision=fp64", "parallel.zero_stage=3")
    whole, decided, skipped = tasks.train_and_break(str(tmp_path / "whole"), words[0])
    if first == "one":
        path = tasks.train_and_stop(str(tmp_path / "moved"), words[0])
        results = two.run(tasks.resume_and_break, path, words[1])
    else:
        path, _ = two.run(tasks.train_and_stop, str(tmp_path / "moved"), *words)
        results = [tasks.resume_and_break(path)]
    for result in results:
        assert result[1:] == (decided, skipped)
    assert_equal(whole, path, 1e-9)


def test_each_process_reads_its_own_part(two: Pool, tmp_path: Path) -> None:
    run = tasks.train(str(tmp_path), *HALF)
    (first, whole), (second, _) = two.run(tasks.numbers_read, run)
    assert first + second == whole
    assert max(first, second) < 0.6 * whole


def test_what_two_wrote_is_listed_and_made_one_file(two: Pool, tmp_path: Path) -> None:
    run, _ = two.run(tasks.train, str(tmp_path), "training.max_steps=2")
    folder = RunFolder(Path(run))
    contents = inspect_checkpoint(folder.checkpoint("last"))
    assert contents.num_processes == 2
    shards = {tensor.name: tensor.num_shards for tensor in contents.tensors}
    assert shards["model/embedding.weight"] == 2
    target, remark = consolidate(folder, "last")
    assert (remark, sorted(path.name for path in target.iterdir())) == (
        "",
        ["config.yaml", "model.safetensors", "origins.yaml", "tokenizer"],
    )
    whole, _ = load_model(target)
    from_run, _ = load_model(run, "last")
    for name, weight in from_run.state_dict().items():
        assert (weight == whole.state_dict()[name]).all(), name


def test_a_missing_shard_is_named(two: Pool, tmp_path: Path) -> None:
    run, _ = two.run(tasks.train, str(tmp_path), "training.max_steps=2")
    last = (Path(run) / "checkpoints" / "last").resolve()
    (last / "shard-00002-model-00001-of-00002.safetensors").unlink()
    with pytest.raises(
        Exception, match=r"shard-00002-model-00001-of-00002\.safetensors is missing"
    ):
        load_checkpoint(last)
    assert read_state(last)["progress"]["step"] == 2
