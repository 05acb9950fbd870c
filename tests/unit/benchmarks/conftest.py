import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.training.conftest import TINY
from ultrathink.config import load_config
from ultrathink.recipes.train import build_trainer
from ultrathink.training.trainer import Trainer

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # its files import each other by their names

GROUPS = (
    "model.moe.groups=[{name: knowledge, num_experts: 8, top_k: 2}, "
    "{name: skill, num_experts: 4, top_k: 2}, {name: meta, num_experts: 4, top_k: 1}]"
)
MakeTrainer = Callable[..., Trainer]


def trainers_in(folder: Path) -> MakeTrainer:
    """Builds trainers of a tiny model, ``dense`` or ``moe``, whose runs lie in ``folder``."""

    def make(model: str, *overrides: str, **parts: Any) -> Trainer:
        experts = [GROUPS, "model.moe.intermediate_size=16", "model.moe.routing.warmup_steps=0"]
        config = load_config(
            "debug",
            [
                *TINY,
                f"run.dir={folder}",
                "training.clip=null",
                "training.micro_batch_size=4",
                "training.schedule={type: wsd, warmup: 0, decay: 0}",
                *(experts if model == "moe" else ()),
                *overrides,
            ],
        )
        return build_trainer(config, **parts)

    return make


@pytest.fixture
def make_trainer(tmp_path: Path) -> MakeTrainer:
    return trainers_in(tmp_path / "runs")
