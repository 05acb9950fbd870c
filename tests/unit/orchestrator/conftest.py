"""Real training logs, where the folder of test data is there."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ultrathink import build_trainer, load_config
from ultrathink.runs.folder import RunFolder

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def real_log() -> Callable[[str], Path]:
    """Path of a public training log; skips where the folder of them is absent."""

    def find(name: str) -> Path:
        named = os.environ.get("ULTRATHINK_TEST_DATA")
        folder = Path(named) if named else REPOSITORY / "../shared/data"
        path = folder / "logs" / name
        if not path.is_file():
            pytest.skip(f"{path} is absent; name the folder of test data in ULTRATHINK_TEST_DATA")
        return path

    return find


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small mixture of experts that was trained for 60 steps; not to be changed."""
    words = (
        "model.moe={groups: [{name: skill, num_experts: 8, top_k: 2},"
        " {name: safety, num_experts: 4, top_k: 1}], intermediate_size: 16}",
        *("training.max_steps=60", "training.log_every=1", "training.eval.every_steps=20"),
        *("monitoring.sinks=[jsonl]", "run.name=small"),
        f"run.dir={tmp_path_factory.mktemp('runs')}",
    )
    trainer = build_trainer(load_config("debug", words))
    trainer.fit()
    return Path(trainer.run.path)


@pytest.fixture
def run(trained_run: Path, tmp_path: Path) -> RunFolder:
    """The trained run, a copy for this test."""
    return RunFolder(Path(shutil.copytree(trained_run, tmp_path / "small", symlinks=True)))
