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


def test_a_name_in_use_gets_a_number(tmp_path: Path) -> None:
    config = load_config("debug", [f"run.dir={tmp_path}"])
    runs = [RunFolder.create(config) for _ in range(3)]
    assert [folder.name for folder, _ in runs] == ["debug", "debug-2", "debug-3"]
    assert [c.run.name for _, c in runs] == ["debug", "debug-2", "debug-3"]


def test_those_who_ask_for_a_name_at_once_get_one_each(tmp_path: Path) -> None:
    config = load_config("debug", [f"run.dir={tmp_path / 'new'}"])
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
    assert all((tmp_path / "new" / name / "config.yaml").is_file() for name in names)


def test_a_folder_for_runs_that_cannot_be_is_an_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    for place in ("link", "file"):
        with pytest.raises(OSError, match="File exists"):
            RunFolder.create(load_config("debug", [f"run.dir={tmp_path / place}"]))


def test_the_resolved_config_comes_back_with_its_origins(tmp_path: Path) -> None:
    config = load_config("debug", [f"run.dir={tmp_path}", "training.clip=0.5"])
    run, config = RunFolder.create(config)
    again = run.read_config()
    assert again == config
    assert again.origin("training.clip") == "override training.clip=0.5"
    assert again.origin("model.hidden_size") == "preset debug"


def test_retention_keeps_the_newest_the_best_and_the_last(run: RunFolder) -> None:
    save(run, 1, is_best=True)
    for step in (2, 3, 4, 5):
        save(run, step)
    assert run.steps() == [1, 4, 5]
    assert run.checkpoint("best").name == "step_00000001"
    assert run.checkpoint("last").name == "step_00000005"
    assert run.checkpoint(4).name == run.checkpoint("4").name == "step_00000004"
    assert (run.checkpoints / "last").resolve().name == "step_00000005"


@pytest.mark.parametrize("lost", ["state.json", "checksums.json"])
def test_a_partial_folder_is_no_checkpoint(run: RunFolder, lost: str) -> None:
    save(run, 1)
    save(run, 2)
    (run.step_path(2) / lost).unlink()
    assert run.steps() == [1]
    assert run.checkpoint("last") == run.step_path(1)


def test_links_survive_a_move(run: RunFolder, tmp_path: Path) -> None:
    save(run, 3, is_best=True)
    moved = RunFolder(run.path.rename(tmp_path / "elsewhere"))
    assert moved.checkpoint("best").is_dir()
    assert os.readlink(moved.checkpoints / "last") == "step_00000003"


def test_going_back_drops_what_came_after(run: RunFolder) -> None:
    save(run, 1, keep=9)
    save(run, 2, is_best=True, keep=9)
    save(run, 3, keep=9)
    run.remove_after(1)
    assert run.steps() == [1]
    assert run.checkpoint("best").name == run.checkpoint("last").name == "step_00000001"
    assert os.readlink(run.checkpoints / "last") == "step_00000001"
    assert not (run.checkpoints / "best").is_symlink()


def test_going_back_hides_before_it_deletes(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        save(run, step, keep=9)
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


def test_a_step_that_is_saved_again_is_replaced(run: RunFolder) -> None:
    path = save(run, 1, is_best=True)
    run.save(1, state(5), is_best=False, keep=2)
    assert value_of(load_checkpoint(path)) == 5
    assert run.checkpoint("best").name == path.name
    assert hidden(run.path) == []


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
    assert run.steps() == [1]


def test_cleaning_puts_back_what_stepped_aside_for_another(run: RunFolder) -> None:
    """Killed after the old one was renamed and before the new one was."""
    save(run, 1, is_best=True)
    run.step_path(1).rename(run.checkpoints / ".step_00000001.old")
    run.clean()
    assert value_of(load_checkpoint(run.checkpoint("best"))) == 1
    assert hidden(run.path) == []


def test_cleaning_mends_the_links(run: RunFolder) -> None:
    save(run, 1, is_best=True)
    save(run, 2)
    shutil.rmtree(run.step_path(2))
    run.clean()
    assert (run.checkpoints / "last").resolve().name == "step_00000001"
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


# -- what a run is founded on ---------------------------------------------------------------------


def test_a_vanished_run_folder_is_created_again(run: RunFolder) -> None:
    run.tokenizer.mkdir()
    small = ("data.json", "manifest.json", "segments.jsonl", "tokenizer/a.json", "tokenizer/b.bin")
    for name in small:
        (run.path / name).write_bytes(name.encode() + b"\0\n")
    run.metrics.write_text("{}")
    files = run.founding()
    assert set(files) == {"config.yaml", "origins.yaml", *small}
    assert not run.restore_founding(files)
    config = run.read_config()
    shutil.rmtree(run.path)
    assert run.restore_founding(files)
    assert run.founding() == files
    assert run.read_config() == config
    assert run.logs.is_dir()
    save(run, 1)
    assert find_run(str(run.path)).steps() == [1]


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


def test_run_at_step() -> None:
    assert split_run("demo") == ("demo", "last")
    assert split_run("demo", "best") == ("demo", "best")
    assert split_run("a@b@7", "best") == ("a@b", "7")


def test_an_older_step_that_comes_late_is_not_the_last(run: RunFolder) -> None:
    save(run, 6, keep=9)
    save(run, 4, is_best=True, keep=9)
    assert os.readlink(run.checkpoints / "last") == "step_00000006"
    assert os.readlink(run.checkpoints / "best") == "step_00000004"
