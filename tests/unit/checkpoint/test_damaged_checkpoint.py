"""Damage that was done to files on the disk: found, named, and an earlier checkpoint used."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.checkpoint.disks import flip, state, value_of
from ultrathink.checkpoint.format import (
    DamagedCheckpointError,
    has_its_sizes,
    load_checkpoint,
    save_checkpoint,
    tensor_shapes,
    verify_checkpoint,
    weights,
)
from ultrathink.runs.folder import RunFolder

WEIGHTS, OTHERS = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
INDEX = "model.safetensors.index.json"
FILES = (WEIGHTS, OTHERS, INDEX, "state.json")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def replace_by_folder(path: Path) -> None:
    size = path.stat().st_size
    path.unlink()
    path.mkdir()
    if path.stat().st_size == size:  # else its size gives it away already
        (path / "more").touch()


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "step_00000001", state(1))
    return tmp_path / "step_00000001"


def test_a_flipped_bit_is_found_wherever_it_is(whole: Path) -> None:
    sizes = {name: (whole / name).stat().st_size for name in FILES}
    places = [(name, at) for name, size in sizes.items() for at in {*range(0, size, 97), size - 1}]
    for name, at in places:
        flip(whole / name, at)
        assert has_its_sizes(whole)
        for check in (verify_checkpoint, load_checkpoint):
            with pytest.raises(
                DamagedCheckpointError,
                match=rf"step_00000001 is damaged: {re.escape(name)}: content",
            ) as caught:
                check(whole)
            assert "--resume RUN@STEP" in str(caught.value)
            assert caught.value.folder == whole
            assert caught.value.problem == f"{name}: content differs from its checksum"
        flip(whole / name, at)
    verify_checkpoint(whole)
    for at in range((whole / "checksums.json").stat().st_size):
        flip(whole / "checksums.json", at)
        with pytest.raises(DamagedCheckpointError):
            verify_checkpoint(whole)
        flip(whole / "checksums.json", at)
    assert value_of(load_checkpoint(whole)) == 1


PROBLEMS: dict[Callable[[Path], None], str] = {
    Path.unlink: r"is missing",
    cut: r"has \d+ bytes instead of \d+",
    empty: r"has 0 bytes instead of \d+",
    replace_by_folder: r"(has|cannot be read)",
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_gone_or_cut_is_named(tmp_path: Path, name: str) -> None:
    for number, (damage, problem) in enumerate(PROBLEMS.items()):
        folder = tmp_path / f"step_{number:08d}"
        save_checkpoint(folder, state(1))
        damage(folder / name)
        for check in (verify_checkpoint, load_checkpoint):
            with pytest.raises(
                DamagedCheckpointError, match=f"damaged: {re.escape(name)} {problem}"
            ):
                check(folder)
        assert not has_its_sizes(folder)


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"state.json": 3}', "{"])
def test_without_its_checksums_a_checkpoint_is_partial(whole: Path, content: str | None) -> None:
    if content is None:
        (whole / "checksums.json").unlink()
    else:
        (whole / "checksums.json").write_text(content)
    for check in (verify_checkpoint, load_checkpoint):
        with pytest.raises(DamagedCheckpointError, match=r"checksums\.json"):
            check(whole)
    assert not has_its_sizes(whole)


@pytest.mark.parametrize("name", [WEIGHTS, INDEX])
@pytest.mark.parametrize("damage", [empty, cut, Path.unlink])
def test_shapes_of_damaged_files_are_an_error_not_a_crash(
    whole: Path, name: str, damage: Callable[[Path], None]
) -> None:
    damage(whole / name)
    with pytest.raises(DamagedCheckpointError, match="cannot be read"):
        tensor_shapes(whole)
    for content in ("[]", "{}", '{"weight_map": 3}', "\xff"):
        (whole / INDEX).write_text(content, encoding="latin-1")
        with pytest.raises(DamagedCheckpointError, match="index"):
            tensor_shapes(whole)


@pytest.mark.parametrize("damage", [empty, cut, Path.unlink, flip])
def test_weights_are_read_though_the_others_are_damaged(
    whole: Path, damage: Callable[[Path], None]
) -> None:
    damage(whole / OTHERS)
    loaded = load_checkpoint(whole, weights)
    assert loaded["model"]["w"].tolist() == [1.0] * 8  # type: ignore[index, call-overload, union-attr]
    with pytest.raises(DamagedCheckpointError, match=OTHERS):
        load_checkpoint(whole)


# -- a run with damaged checkpoints ---------------------------------------------------------------


@pytest.fixture
def three(run: RunFolder) -> RunFolder:
    """A run with checkpoints 1, 2 (the best) and 3."""
    for step in (1, 2, 3):
        run.save(step, state(step), is_best=step == 2, keep=9)
    return run


def test_for_a_damaged_last_the_one_before_is_used_and_each_damaged_one_named(
    three: RunFolder,
) -> None:
    assert three.sound_checkpoint() == (three.step_path(3), [])
    assert three.sound_checkpoint("best") == (three.step_path(2), [])
    assert three.sound_checkpoint(1) == three.sound_checkpoint("1") == (three.step_path(1), [])
    flip(three.step_path(3) / WEIGHTS)
    path, notes = three.sound_checkpoint("last")
    assert path == three.step_path(2)
    assert notes == [
        f"checkpoint step_00000003 is damaged ({WEIGHTS}: content differs from its checksum); "
        f"using step_00000002"
    ]
    (three.step_path(2) / "checksums.json").unlink()  # as if written halfway, without the rename
    path, notes = three.sound_checkpoint("last")
    assert path == three.step_path(1)
    assert [note.split(" (")[0] for note in notes] == [
        "checkpoint step_00000003 is damaged",
        "checkpoint step_00000002 is damaged",
    ]
    assert all(note.endswith("; using step_00000001") for note in notes)
    assert three.sound_checkpoint("best") == (path, notes[::-1])  # the best first, then the newest
    empty(three.step_path(1) / "state.json")
    with pytest.raises(DamagedCheckpointError, match="Start a new run like it") as caught:
        three.sound_checkpoint()
    assert "step_00000001: state.json has 0 bytes" in str(caught.value)
    assert "step_00000002: checksums.json is missing" in str(caught.value)


def test_a_named_step_has_to_be_sound_itself(three: RunFolder) -> None:
    flip(three.step_path(2) / OTHERS)
    with pytest.raises(DamagedCheckpointError, match=rf"{OTHERS}: content differs") as caught:
        three.sound_checkpoint(2)
    assert f"(there are: 1, 3): --resume {three.path}@1" in str(caught.value)
    assert three.sound_checkpoint(2, weights) == (three.step_path(2), [])
    for step in (1, 3):
        shutil.rmtree(three.step_path(step))
    with pytest.raises(DamagedCheckpointError, match="It is the only one of run"):
        three.sound_checkpoint(2)


# -- retention ------------------------------------------------------------------------------------


def test_checkpoints_that_lack_bytes_do_not_count_among_those_kept(run: RunFolder) -> None:
    for step in (1, 2, 3):
        run.save(step, state(step), is_best=False, keep=3)
    cut(run.step_path(2) / WEIGHTS)
    (run.step_path(3) / "checksums.json").unlink()
    run.save(4, state(4), is_best=False, keep=2)
    assert run.steps() == [1, 4]
    assert value_of(load_checkpoint(run.step_path(1))) == 1
    run.save(5, state(5), is_best=True, keep=1)
    cut(run.step_path(5) / OTHERS)
    for step in (9, 7):  # the last that was written is kept though there is a later one
        run.save(step, state(step), is_best=False, keep=1)
    assert run.steps() == [5, 7, 9]  # the weights of the best can still be read
