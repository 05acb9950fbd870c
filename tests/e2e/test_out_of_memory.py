"""Runs with less memory than they ask for: an address-space limit, and one of two processes."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.launching import TINY, Launched
from tests.stress.evidence import rows
from tests.stress.process import ultrathink

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's"),
]

# Lets a call of the stepper have so many MiB beyond what the process has before its first one.
LIMIT = """
import resource
from pathlib import Path
from ultrathink.training.hardware import return_freed_memory
from ultrathink.training.stepping import Stepper

allowed = []

def limited(method):
    def call(*args, **options):
        if not allowed:
            return_freed_memory()
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            allowed.append(pages * resource.getpagesize() + ({headroom} << 20))
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (allowed[0], before[1]))
        try:
            return method(*args, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)
    return call

Stepper.{method} = limited(Stepper.{method})
"""
MODEL = (
    "model.hidden_size=128",
    "model.num_layers=3",
    "model.num_heads=4",
    "data.seq_len=256",
    "data.train=[{type: dummy, num_documents: 400, num_words: 200}]",
    "training.batch_size=16",
    "training.micro_batch_size=16",
    "training.max_steps=3",
    "training.log_every=1",
    "training.precision=fp32",
    "training.compile=false",
    "training.sample.prompts=[]",
    "monitoring.sinks=[console, jsonl]",
)


def train(
    place: Path, *words: str, method: str = "", headroom: int = 0
) -> subprocess.CompletedProcess[str]:
    plugins = []
    if method:
        plugin = place / "limit.py"
        plugin.write_text(LIMIT.format(method=method, headroom=headroom))
        plugins = [f"--plugin={plugin}"]
    return ultrathink(place, "train", "debug", *MODEL, *plugins, *words)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_with_little_memory_reaches_what_it_would_have(tmp_path: Path) -> None:
    whole = train(tmp_path, "run.name=whole")
    assert whole.returncode == 0, whole.stderr
    assert "micro_batch_size" not in whole.stderr
    small = train(tmp_path, "run.name=small", method="take_step", headroom=100)
    assert small.returncode == 0, small.stderr
    assert small.stderr.count("micro_batch_size: 16 -> ") == 1
    assert "(step 1 ran out of memory: " in small.stderr
    runs = tmp_path / "runs"
    assert losses(runs / "small") == pytest.approx(losses(runs / "whole"), rel=1e-5)
    state = json.loads((runs / "small" / "checkpoints" / "last" / "state.json").read_text())
    size = _setting(state, "micro_batch_size")
    assert size in (8, 4, 2)
    assert f" -> {size} (step " in small.stderr  # after one failure, or a later one


def _setting(state: dict[str, object], name: str) -> object:
    text = json.dumps(state)
    settings, _ = json.JSONDecoder().raw_decode(text, text.index('"settings": ') + 12)
    return settings[name]


@pytest.mark.parametrize(
    ("method", "headroom", "words", "reported"),
    [
        ("take_step", 8, (), "training ran out of memory with micro-batches of a single sequence"),
        (
            "allocate_state",
            20,
            ("model.hidden_size=512",),
            "there is not enough memory for the optimizer state",
        ),
    ],
)
def test_what_does_not_fit_is_reported_in_one_message(
    tmp_path: Path, method: str, headroom: int, words: tuple[str, ...], reported: str
) -> None:
    done = train(tmp_path, *words, method=method, headroom=headroom)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error:") == 1
    assert f"error: {reported}" in done.stderr
    assert "MiB could not be allocated" in done.stderr
    assert "Traceback" not in done.stderr


# Lets passes over more than one sequence fail on the second process from a step on.
SCARCE = """
import torch
from ultrathink.training.trainer import Trainer

start = Trainer.start

def scarce_start(trainer):
    losses = trainer.objective.sums
    def scarce(ids, *rest):
        if trainer.world.rank == 1 and trainer.progress.step + 1 >= {step} and len(ids) > 1:
            torch.empty(1 << 60, dtype=torch.uint8)
        return losses(ids, *rest)
    trainer.objective.sums = scarce
    start(trainer)

Trainer.start = scarce_start
"""


def test_when_one_process_runs_out_all_start_again_smaller(
    start: Callable[..., Launched], tmp_path: Path
) -> None:
    plugin = tmp_path / "scarce.py"
    plugin.write_text(SCARCE.format(step=8))
    words = ("debug", *TINY, "training.max_steps=12")
    run = start(f"--plugin={plugin}", *words, "training.checkpoint={every_steps: 5, keep: 9}")
    assert run.status() == 0, run.stderr
    assert run.stderr.count("error:") == 1
    assert "error: process 1 ran out of memory with micro-batches of 2 (" in run.stderr
    reported = "process 1 ran out of memory; all restart from the last checkpoint (3 restarts left)"
    assert reported in run.stderr
    assert "micro_batch_size: 2 -> 1 (step 8 ran out of memory on process 1: " in run.stderr
    assert "Traceback" not in run.stderr
    steps = [row["step"] for row in rows(run.run) if row["split"] == "train"]
    assert steps == list(range(1, 13))
    assert [path.name for path in run.run.parent.iterdir()] == ["together"]
    segments = (run.run / "segments.jsonl").read_text().splitlines()
    assert [json.loads(line)["from_step"] for line in segments] == [0, 5]
