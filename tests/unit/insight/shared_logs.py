"""Public training logs as signals, read in a few lines of the tests' own."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ultrathink.orchestrator.signals import Signals

REPOSITORY = Path(__file__).parents[3]
MEGATRON = {"lm loss": "loss", "mem-allocated-bytes": "memory", "iteration-time": "step_time"}
TRAINER_STATE = {
    "loss": "loss",
    "eval_loss": "val_loss",
    "grad_norm": "grad_norm",
    "learning_rate": "lr",
    "lr": "lr",
    "train/acc_0": "accuracy",
}
LLM_C = re.compile(r"s:(\d+) trl:(\S+)(?: lr:(\S+) norm:(\S+))?")
DEEPSPEED_SKIPPED = re.compile(r"step=(\d+), skipped=(\d+)")


def shared_log(name: str) -> Path:
    """Path of a public training log; skips where the folder of them is absent."""
    named = os.environ.get("ULTRATHINK_TEST_DATA")
    path = (Path(named) if named else REPOSITORY / "../shared/data") / "logs" / name
    if not path.is_file():
        pytest.skip(f"{path} is absent; name the folder of test data in ULTRATHINK_TEST_DATA")
    return path


def read(name: str) -> list[Signals]:
    """The training steps of a public log."""
    path = shared_log(name)
    text = path.read_text(encoding="utf-8")
    if name.startswith("megatron"):
        return list(_megatron(json.loads(text)))
    if path.suffix == ".json":
        return [
            Signals(row["step"], {b: row[a] for a, b in TRAINER_STATE.items() if a in row})
            for row in json.loads(text)["log_history"]
        ]
    if path.suffix == ".csv":
        rows = csv.DictReader(text.splitlines())
        return [
            Signals(int(row["step"]), {"loss": float(row["loss"])})
            for row in rows
            if row.get("kind", "train") == "train"
        ]
    return list(_lines(text))


def _megatron(columns: dict[str, Any]) -> Iterator[Signals]:
    for step in columns["lm loss"]["values"]:
        values = {}
        for name, signal in MEGATRON.items():
            value = float(columns.get(name, {}).get("values", {}).get(step, "nan"))
            if math.isfinite(value):  # "nan" is written for what was not recorded
                values[signal] = value / 2**30 if signal == "memory" else value
        yield Signals(int(step), values)


def _lines(text: str) -> Iterator[Signals]:
    for step, loss, rate, norm in LLM_C.findall(text):
        values = {"loss": loss, "lr": rate, "grad_norm": norm}
        yield Signals(int(step), {name: float(x) for name, x in values.items() if x})
    for step, skipped in DEEPSPEED_SKIPPED.findall(text):
        yield Signals(int(step), {"skipped_steps": float(skipped)})
