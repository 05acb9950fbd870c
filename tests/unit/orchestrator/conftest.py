"""Real training logs, where the folder of test data is there."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.sharing import Shared
from ultrathink import build_trainer, load_config
from ultrathink.runs.folder import RunFolder


@pytest.fixture(scope="session")
def real_log(public_file: Callable[[str], Path]) -> Callable[[str], Path]:
    """Path of a public training log; skips where the folder of them is absent."""
    return lambda name: public_file(f"logs/{name}")


@pytest.fixture(scope="session")
def trained_run(shared: Shared) -> Path:
    """A small mixture of experts that was trained for 60 steps; not to be changed."""
    words = (
        "model.moe={groups: [{name: skill, num_experts: 8, top_k: 2},"
        " {name: safety, num_experts: 4, top_k: 1}], intermediate_size: 16}",
        *("training.max_steps=60", "training.log_every=1", "training.eval.every_steps=20"),
        *("monitoring.sinks=[jsonl]", "run.name=small"),
    )

    def fill(folder: Path) -> None:
        build_trainer(load_config("debug", (*words, f"run.dir={folder}"))).fit()

    return shared.folder("mixture", fill) / "small"


@pytest.fixture
def run(trained_run: Path, tmp_path: Path) -> RunFolder:
    """The trained run, a copy for this test."""
    return RunFolder(Path(shutil.copytree(trained_run, tmp_path / "small", symlinks=True)))
