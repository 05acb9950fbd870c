"""A run on two processes is the run on one: losses, norms and weights, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed import tasks
from tests.distributed.conftest import RunTask
from tests.unit.training.observers import records, without_time
from ultrathink.checkpoint.format import load_checkpoint
from ultrathink.runs.folder import RunFolder

FP64 = ("training.precision=fp64", "training.max_steps=4", "training.eval.every_steps=2")
LIMIT = 1e-9
TIMES = {"communication_share", "compute_s_fastest", "compute_s_slowest"}

DDP = ("parallel.dp_replicate=2",)
ZERO_1 = ("parallel.zero_stage=1", "training.micro_batch_size=1")
ZERO_2 = ("parallel.zero_stage=2", "training.activation_checkpointing=full")
ZERO_3 = ("parallel.zero_stage=3", "training.micro_batch_size=1")
RECOMPUTED = ("parallel.zero_stage=3", "training.activation_checkpointing=selective")
OFFLOADED = ("parallel.offload=params", "training.micro_batch_size=1")
OFFLOADED_RECOMPUTED = ("parallel.offload=params", "training.activation_checkpointing=selective")

MUON = "training.optimizer={type: muon, lr: 0.01, weight_decay: 0.1}"
ADAMW = "training.optimizer={type: adamw, lr: 0.01}"
TEXT = "type: dummy, num_documents: 30, num_words: 40"
TAUGHT = (
    "model.moe.group_gates=true",
    f"data.train=[{{{TEXT}, groups: [b]}}, {{{TEXT}, name: other, seed: 1}}]",
)
MUTUAL = ("training.objective=mutual", ADAMW)
# What is trained: its options, and the ways in which it is divided.
RUNS: dict[str, tuple[tuple[str, ...], list[tuple[str, ...]]]] = {
    "text": (
        (),
        [
            *(DDP, ZERO_1, RECOMPUTED),
            ("parallel.zero_stage=3", "data.num_workers=1"),
            ("parallel.offload=params",),
            ("parallel.offload=optimizer",),
        ],
    ),
    # Packing leaves sequences with few trained tokens: means of means would differ.
    "unpacked": (("data.packing.enabled=false", "data.seq_len=96"), [()]),
    "experts": ((*tasks.EXPERTS, *TAUGHT), [DDP, ZERO_1, RECOMPUTED]),
    "depth": (tasks.DEPTH, [DDP, ZERO_1, ZERO_2, RECOMPUTED]),
    "muon": ((*tasks.EXPERTS, MUON), [ZERO_2, ZERO_3, OFFLOADED]),
    "two passes": (
        ("training.objective=twice",),
        [DDP, ZERO_1, ZERO_2, ZERO_3, OFFLOADED_RECOMPUTED],
    ),
    "elastic": (
        (
            *tasks.ELASTIC,
            "training.objective={type: elastic, exits: {ramp_steps: 0}, "
            "sub_paths: {rows: 0.5, layer_dropout: 0.5, sample_top_k: true, ramp_steps: 0}}",
        ),
        [DDP, ZERO_1, ZERO_2, ZERO_3, OFFLOADED_RECOMPUTED],
    ),
    "teacher": ((), [DDP, ZERO_2, ZERO_3, OFFLOADED_RECOMPUTED]),
    "weights": (("training.objective=weighted", "model.z_loss=0.01"), [ZERO_1, ()]),
    "critic": (("training.objective=critic", ADAMW), [DDP, ZERO_3]),
    "mutual": (MUTUAL, [ZERO_1, ZERO_2, OFFLOADED_RECOMPUTED]),
}


def saved(run: str) -> dict[str, Any]:
    """The tensors of the last checkpoint as one process reads them."""
    state: Any = load_checkpoint(Path(run) / "checkpoints" / "last")
    return {k: state[k] for k in ("model", "modules", "optimizer", "data") if k in state}


def assert_close(here: Any, there: Any, limit: float = 0.0, path: str = "") -> None:
    """Equal keys and values, arrays within ``limit``."""
    if isinstance(here, dict):
        assert here.keys() == there.keys(), path
        for key in here:
            assert_close(here[key], there[key], limit, f"{path}/{key}")
    elif hasattr(here, "shape"):
        here, there = np.asarray(here), np.asarray(there)
        assert here.shape == there.shape, path
        np.testing.assert_allclose(there, here, rtol=0, atol=limit, err_msg=path)
    else:
        assert here == there, path


def assert_equal(reference: str, other: str, limit: float) -> None:
    """Equal figures of each step, and weights."""
    rows = [without_time(records(RunFolder(Path(run)))) for run in (reference, other)]
    for here, there in zip(*rows, strict=True):
        for name in here.keys() - TIMES:
            expected = here[name]
            if isinstance(expected, float):
                expected = pytest.approx(expected, abs=limit, rel=limit)
            assert there[name] == expected, name
    for kind in ("model", "modules"):
        assert_close(saved(reference).get(kind, {}), saved(other).get(kind, {}), limit)


@pytest.mark.parametrize(
    ("kind", "divided"),
    [
        pytest.param(kind, divided, id=f"{kind}-{' '.join(divided)}")
        for kind, (_, ways) in RUNS.items()
        for divided in ways
    ],
)
def test_two_processes_equal_one(
    alone: RunTask, both: RunTask, distill: str, kind: str, divided: tuple[str, ...]
) -> None:
    """Auxiliary losses, biases of experts and other modules included."""
    words = (*FP64, *RUNS[kind][0], *((distill,) if kind == "teacher" else ()))
    one = alone(tasks.train, *words)
    run, _ = both(tasks.train, *words, *divided)
    assert_equal(one, run, LIMIT)
    if kind == "depth":
        thresholds = [v for name, v in saved(run)["model"].items() if name.endswith("thresholds")]
        assert [bool(one.any()) for one in thresholds] == [True, True]
    if kind == "experts":
        gates = [v for name, v in saved(run)["model"].items() if "group_gates" in name]
        assert [bool(gate.any()) for gate in gates] == [True, True]
        biases = [v for name, v in saved(run)["model"].items() if name.endswith("selection_bias")]
        assert [bool(bias.any()) for bias in biases] == [True, True]


@pytest.mark.parametrize("kind", ["text", "teacher", "mutual"])
def test_fp32_agrees_for_three_steps(
    alone: RunTask, both: RunTask, distill: str, kind: str
) -> None:
    words = ("training.max_steps=3", *((distill,) if kind == "teacher" else RUNS[kind][0]))
    one = alone(tasks.train, *words)
    assert_equal(one, both(tasks.train, *words)[0], 1e-5)
