from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from ultrathink.config import load_config
from ultrathink.recipes.train import build_trainer
from ultrathink.training.trainer import Trainer

TINY = (
    "model.hidden_size=32",
    "model.num_layers=2",
    "model.num_heads=2",
    "data.seq_len=32",
    "data.train=[{type: dummy, num_documents: 60, num_words: 40}]",
    "training.batch_size=4",
    "training.log_every=1",
    "training.sample.prompts=[]",
    "monitoring.sinks=[jsonl]",
)

MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def make_trainer(tmp_path: Path) -> MakeTrainer:
    """Builds trainers of a tiny model in a folder of the test's own."""

    def make(*overrides: str, **parts: object) -> Trainer:
        config = load_config("debug", [*TINY, f"run.dir={tmp_path / 'runs'}", *overrides])
        return build_trainer(config, **parts)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> MakeTrainer:
    """Trainers of finished runs that tests only read, each made once."""

    def make(*overrides: str) -> Trainer:
        place = tmp_path_factory.mktemp("finished")
        trainer = build_trainer(load_config("debug", [*TINY, f"run.dir={place}", *overrides]))
        trainer.fit()
        return trainer

    return cache(make)
