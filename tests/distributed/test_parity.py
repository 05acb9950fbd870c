"""A run on two processes is the run on one: losses, norms and weights, in float64."""

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.distributed import tasks
from tests.distributed.pool import Pool
from ultrathink.checkpoint.format import load_checkpoint

FP64 = ("training.precision=fp64", "training.max_steps=6", "training.eval.every_steps=3")
LIMIT = 1e-9


def rows(run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def weights(run: str) -> dict[str, Tensor]:
    state: Any = load_checkpoint(Path(run) / "checkpoints" / "last")
    return dict(state["model"])


def assert_equal(reference: str, other: str, limit: float) -> None:
    for here, there in zip(rows(reference), rows(other), strict=True):
        assert (here["step"], here["split"]) == (there["step"], there["split"])
        for key in ("loss", "grad_norm", "bits_per_byte", "token_accuracy", *expert_losses(here)):
            if key in here:
                assert there[key] == pytest.approx(here[key], abs=limit, rel=limit)
    expected = weights(reference)
    found = weights(other)
    assert list(expected) == list(found)
    for name, tensor in expected.items():
        assert float((tensor.double() - found[name].double()).abs().max()) <= limit, name


def expert_losses(row: dict[str, Any]) -> list[str]:
    return [key for key in row if key.startswith("moe_")]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tasks.train(str(tmp_path_factory.mktemp("one")), *FP64)


@pytest.mark.parametrize(
    "overrides",
    [
        ("parallel.dp_replicate=2",),
        ("parallel.zero_stage=1", "training.micro_batch_size=1"),
        ("parallel.zero_stage=2", "training.activation_checkpointing=full"),
        ("parallel.zero_stage=3", "training.micro_batch_size=1"),
        ("parallel.zero_stage=3", "training.activation_checkpointing=selective"),
        ("parallel.zero_stage=3", "data.num_workers=1"),
        ("parallel.offload=params",),
        ("parallel.offload=optimizer",),
    ],
    ids=lambda overrides: ", ".join(word.partition(".")[2] for word in overrides),
)
def test_two_processes_equal_one(
    two: Pool, tmp_path: Path, reference: str, overrides: tuple[str, ...]
) -> None:
    run, _ = two.run(tasks.train, str(tmp_path), *FP64, *overrides)
    assert_equal(reference, run, LIMIT)


MUON = "training.optimizer={type: muon, lr: 0.01, weight_decay: 0.1}"


@pytest.fixture(scope="module", params=["adamw", "muon"])
def with_experts(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, tuple[str, ...]]:
    """A run of a model with experts on one process, and what it was asked for."""
    words = (*FP64, *tasks.EXPERTS, *([MUON] if request.param == "muon" else []))
    return tasks.train(str(tmp_path_factory.mktemp("experts")), *words), words


@pytest.mark.parametrize(
    "overrides",
    [
        ("parallel.dp_replicate=2",),
        ("parallel.zero_stage=1", "training.micro_batch_size=1"),
        ("parallel.zero_stage=2", "training.activation_checkpointing=full"),
        ("parallel.zero_stage=3", "training.activation_checkpointing=selective"),
        ("parallel.offload=params", "training.micro_batch_size=1"),
    ],
    ids=lambda overrides: ", ".join(word.partition(".")[2] for word in overrides),
)
def test_experts_on_two_processes(
    two: Pool,
    tmp_path: Path,
    with_experts: tuple[str, tuple[str, ...]],
    overrides: tuple[str, ...],
) -> None:
    """Their losses, their biases, empty slots and what is dropped, too."""
    alone, words = with_experts
    run, _ = two.run(tasks.train, str(tmp_path), *words, *overrides)
    assert_equal(alone, run, LIMIT)
    assert len(expert_losses(rows(alone)[0])) == 4
    biases = [value for name, value in weights(run).items() if name.endswith("selection_bias")]
    assert [bool(bias.any()) for bias in biases] == [True, True]


def test_muon_on_parts_of_matrices(two: Pool, tmp_path: Path) -> None:
    words = (*FP64, MUON)
    alone = tasks.train(str(tmp_path / "one"), *words)
    run, _ = two.run(tasks.train, str(tmp_path / "two"), *words)
    assert_equal(alone, run, LIMIT)


def test_tokens_are_weighed_over_all_processes(two: Pool, tmp_path: Path) -> None:
    """Packing leaves sequences with few trained tokens: means of means would differ."""
    words = (*FP64, "data.packing.enabled=false", "data.seq_len=96")
    alone = tasks.train(str(tmp_path / "one"), *words)
    run, _ = two.run(tasks.train, str(tmp_path / "two"), *words)
    assert_equal(alone, run, LIMIT)


def test_fp32_agrees_for_three_steps(two: Pool, tmp_path: Path) -> None:
    words = ("training.max_steps=3",)
    alone = tasks.train(str(tmp_path / "one"), *words)
    run, _ = two.run(tasks.train, str(tmp_path / "two"), *words)
    assert_equal(alone, run, 1e-5)
