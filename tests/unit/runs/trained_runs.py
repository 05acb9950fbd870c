"""Runs to look at: trained for a moment, or put together from a few files."""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from ultrathink.config import load_config
from ultrathink.recipes.train import build_trainer
from ultrathink.runs.folder import RunFolder


def train(place: Path, *overrides: str) -> RunFolder:
    """A run of the debug preset below ``place/runs``, trained to its end."""
    config = load_config(
        "debug",
        [
            f"run.dir={place / 'runs'}",
            f"data.cache_dir={place / 'cache'}",
            "monitoring.sinks=[jsonl]",
            "training.sample.prompts=[]",
            *overrides,
        ],
    )
    trainer = build_trainer(config)
    trainer.fit()
    return trainer.run


def make_run(
    place: Path, name: str = "debug", *, saved: Iterable[int] = (), total: int = 20, **progress: Any
) -> RunFolder:
    """A run folder with a configuration and tiny checkpoints of the steps ``saved``."""
    config = load_config(
        "debug", [f"run.dir={place}", f"run.name={name}", f"training.max_steps={total}"]
    )
    run, _ = RunFolder.create(config)
    for step in saved:
        state: dict[str, Any] = {
            "model": {"w": torch.full((4,), float(step))},
            "progress": {"step": step, "elapsed_s": float(step), **progress},
            "budget": {"total_steps": total, "tokens_per_step": 512, "validation_s": 2.0},
        }
        run.save(step, state, is_best=False, keep=9)
    return run


def rewrite_state(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what the state.json of a checkpoint holds, and its checksum with it."""
    path, sums_path = checkpoint / "state.json", checkpoint / "checksums.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    sums = json.loads(sums_path.read_text())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    sums[path.name] = {"size": path.stat().st_size, "sha256": digest}
    sums_path.write_text(json.dumps(sums))


def train_line(step: int, loss: float | None, **values: Any) -> dict[str, Any]:
    """A line of metrics of a training step, 512 tokens a step unless said otherwise."""
    line = {"step": step, "split": "train", "time": 1000.0 + step, "loss": loss}
    return {**line, "tokens": 512 * step, **values}


def val_line(step: int, loss: float, **values: Any) -> dict[str, Any]:
    """A line of metrics of a validation."""
    line = {"step": step, "split": "val", "time": 1000.5 + step, "loss": loss}
    return {**line, "tokens": 512 * step, "bits_per_byte": loss / 2, **values}


def write_lines(path: Path, lines: Iterable[dict[str, Any] | str]) -> None:
    """Write a file of JSON lines; a string stands as it is, which may be torn."""
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    path.write_text(text)
