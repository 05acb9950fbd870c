import os
import shutil
import threading
from pathlib import Path

import pytest

from tests.unit.checkpoint.disks import hidden, state, value_of
from ultrathink.checkpoint.format import load_checkpoint
from ultrathink.config import load_config
from ultrathink.core.errors import CheckpointError
from ultrathink.runs.folder import RunFolder, find_run, split_run


def save(run: RunFolder, step: int, *, is_best: bool = False, keep: int = 2) -> Path:
    return run.save(step, state(step), is_best=is_best, keep=keep)


def test_those_who_ask_for_a_name_at_once_get_one_each(tmp_path: Path) -> None:
    config = load_config("debug", [f"run.dir={tmp_path / 'new'}", "training.clip=0.5"])
    start = threading.Barrier(8)
    names: list[str] = []

    def create() -> None:
        start.wait()
        names.append(RunFolder.create(config)[0].name)

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(names) == ["debug", *(f"debug-{number}" for number in range(2, 9))]
    for name in names:
        config = RunFolder(tmp_path / "new" / name).read_config()
        assert config.run.name == name
        assert config.origin("training.clip") == "override training.clip=0.5"
        assert config.origin("model.hidden_size") == "preset debug"


def test_a_folder_for_runs_that_cannot_be_is_an_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    for place in ("link", "file"):
        with pytest.raises(OSError, match="File exists"):
            RunFolder.create(load_config("debug", [f"run.dir={tmp_path / place}"]))


def test_retention_keeps_the_newest_the_best_and_the_last(run: RunFolder) -> None:
    save(run, 1, is_best=True)
    for step in (2, 3, 4, 5):
        save(run, step)
    assert run.steps() == [1, 4, 5]
    assert run.checkpoint("best").name == "step_00000001"
    assert run.checkpoint("last").name == "step_00000005"
    assert run.checkpoint(4).name == run.checkpoint("4").name == "step_00000004"
    assert os.readlink(run.checkpoints / "last") == "step_00000005"
    save(run, 3, is_best=True, keep=9)  # an older step that comes late is not the last
    run.save(3, state(33), is_best=False, keep=9)  # and one that is saved again is replaced
    moved = RunFolder(run.path.rename(run.path.with_name("elsewhere")))  # links survive a move
    assert os.readlink(moved.checkpoints / "last") == "step_00000005"
    assert value_of(load_checkpoint(moved.checkpoint("best"))) == 33
    assert hidden(moved.path) == []
    (moved.step_path(5) / "state.json").unlink()
    (moved.step_path(4) / "checksums.json").unlink()
    assert moved.steps() == [1, 3]  # a partial folder is no checkpoint
    assert moved.checkpoint("last") == moved.step_path(3)


def test_going_back_hides_before_it_deletes(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        save(run, step, is_best=step == 2, keep=9)
    (run.step_path(2) / "checksums.json").unlink()  # partial ones go as well

    def killed(path: Path, ignore_errors: bool) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            run.remove_after(1)
    assert len(hidden(run.path)) == 1  # and no folder without some of its files
    run.clean()
    run.remove_after(1)
    assert (run.steps(), hidden(run.path)) == ([1], [])
    assert not run.step_path(2).exists()
    assert run.checkpoint("best").name == os.readlink(run.checkpoints / "last") == "step_00000001"
    assert not (run.checkpoints / "best").is_symlink()


# -- after a crash --------------------------------------------------------------------------------


def test_cleaning_removes_what_was_not_finished(run: RunFolder) -> None:
    save(run, 1)
    run.tokenizer.mkdir()
    for name in (".step_00000002.tmp", ".step_00000002.deleted", ".step_00000001.old"):
        shutil.copytree(run.step_path(1), run.checkpoints / name)
    for path in (run.path, run.tokenizer):
        (path / ".config.yaml.4711.tmp").touch()
    kept = [run.path / ".lock", run.path / ".owner.json", run.path / "mine.tmp"]
    for path in kept:
        path.touch()
    run.clean()
    assert hidden(run.path) == [".lock", ".owner.json"]
    assert all(path.exists() for path in kept)
    # Killed after the old one was renamed and before the new one was.
    run.step_path(1).rename(run.checkpoints / ".step_00000001.old")
    run.clean()
    assert value_of(load_checkpoint(run.checkpoint("last"))) == 1
    assert os.readlink(run.checkpoints / "last") == "step_00000001"
    shutil.rmtree(run.step_path(1))
    run.clean()
    assert list(run.checkpoints.iterdir()) == []
    shutil.rmtree(run.checkpoints)
    run.clean()


def test_a_best_checkpoint_is_known_though_killed_before_its_link(run: RunFolder) -> None:
    """Killed after the checkpoint was renamed and before the links were."""
    save(run, 1, is_best=True)
    save(run, 2)
    for name in ("best", "last"):
        (run.checkpoints / name).unlink()
        (run.checkpoints / name).symlink_to("step_00000001")
        (run.checkpoints / f".{name}.tmp").symlink_to("step_00000002")
    run.clean()
    for name in ("best", "last"):
        assert os.readlink(run.checkpoints / name) == "step_00000002"
    (run.checkpoints / ".best.tmp").symlink_to("step_00000003")  # killed while it was written
    run.clean()
    assert os.readlink(run.checkpoints / "best") == "step_00000002"
    assert hidden(run.path) == []


# -- finding runs ---------------------------------------------------------------------------------


def test_messages_say_what_there_is(run: RunFolder, tmp_path: Path) -> None:
    for asked in (run.checkpoint, run.sound_checkpoint):
        with pytest.raises(CheckpointError, match="has no checkpoint yet"):
            asked()
    save(run, 10)
    for asked in (run.checkpoint, run.sound_checkpoint):
        with pytest.raises(CheckpointError, match="no checkpoint of step 11; there are: 10"):
            asked(11)
        with pytest.raises(CheckpointError, match="'newest' is not a checkpoint; use last, best"):
            asked("newest")
    (tmp_path / "empty").mkdir()
    for name, place, message in (
        ("debg", tmp_path, r"there is no run 'debg'\. Did you mean 'debug'\?"),
        (str(tmp_path / "empty"), tmp_path, r"is not a run folder: it has no config\.yaml"),
        ("auto", tmp_path / "nowhere", "there is no run in .* to resume"),
    ):
        with pytest.raises(CheckpointError, match=message):
            find_run(name, place)


def test_runs_are_found_by_name_path_and_age(tmp_path: Path) -> None:
    config = load_config("debug", [f"run.dir={tmp_path}"])
    first, _ = RunFolder.create(config)
    second, _ = RunFolder.create(config)
    os.utime(first.path / "config.yaml", (1, 1))
    os.utime(first.checkpoints, (1, 1))
    assert find_run("debug", tmp_path).path == first.path
    assert find_run(str(second.path), "nowhere").path == second.path
    assert find_run("auto", tmp_path).path == second.path
    assert split_run("demo") == ("demo", "last")
    assert split_run("a@b@7", "best") == ("a@b", "7")
