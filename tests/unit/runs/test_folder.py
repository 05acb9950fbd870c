import os
from pathlib import Path

import pytest
import torch

from ultrathink.config import load_config
from ultrathink.core.errors import CheckpointError
from ultrathink.runs.folder import RunFolder, find_run, split_run


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(load_config("debug", [f"run.dir={tmp_path}"]))[0]


def save(run: RunFolder, step: int, *, is_best: bool = False, keep: int = 2) -> Path:
    return run.save(step, {"model": {"w": torch.full((2,), step)}}, is_best=is_best, keep=keep)


def test_a_name_in_use_gets_a_number(tmp_path: Path) -> None:
    config = load_config("debug", [f"run.dir={tmp_path}"])
    runs = [RunFolder.create(config) for _ in range(3)]
    assert [folder.name for folder, _ in runs] == ["debug", "debug-2", "debug-3"]
    assert [c.run.name for _, c in runs] == ["debug", "debug-2", "debug-3"]


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


def test_messages_say_what_there_is(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        run.checkpoint()
    save(run, 10)
    with pytest.raises(CheckpointError, match="no checkpoint of step 11; there are: 10"):
        run.checkpoint(11)
    with pytest.raises(CheckpointError, match="'newest' is not a checkpoint; use last, best or"):
        run.checkpoint("newest")
    with pytest.raises(CheckpointError, match=r"there is no run 'debg'\. Did you mean 'debug'\?"):
        find_run("debg", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"is not a run folder: it has no config\.yaml"):
        find_run(str(tmp_path / "empty"), tmp_path)
    with pytest.raises(CheckpointError, match=r"there is no run in .* to resume"):
        find_run("auto", tmp_path / "nowhere")


def test_runs_are_found_by_name_path_and_age(tmp_path: Path) -> None:
    config = load_config("debug", [f"run.dir={tmp_path}"])
    first, _ = RunFolder.create(config)
    second, _ = RunFolder.create(config)
    os.utime(first.path / "config.yaml", (1, 1))
    os.utime(first.checkpoints, (1, 1))
    assert find_run("debug", tmp_path).path == first.path
    assert find_run(str(second.path), "nowhere").path == second.path
    assert find_run("auto", tmp_path).path == second.path


@pytest.mark.parametrize(
    ("text", "parts"),
    [("demo", ("demo", "last")), ("demo@100", ("demo", "100")), ("a@b@best", ("a@b", "best"))],
)
def test_run_at_step(text: str, parts: tuple[str, str]) -> None:
    assert split_run(text) == parts
