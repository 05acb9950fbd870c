"""The benchmarks run and print what they say; the figures themselves are not looked at."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ultrathink.config import load_config

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script: str, *arguments: str) -> Any:
    """The JSON object that a benchmark prints."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *arguments, "--json"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {"date", "processor", "threads", "gpus"} <= set(result["setting"])
    return result


@pytest.fixture
def speedrun(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("speedrun", BENCHMARKS / "speedrun.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("script", "arguments", "told"),
    [
        ("train_speed.py", ["--device", "cuda:77"], "training.device = 'cuda:77'"),
        ("memory.py", ["--device", "gpu"], "no such kind of device; use auto, cpu"),
        ("speedrun.py", ["--only", "dmeo"], "'dmeo' is not in speedrun.yaml. Did you mean 'demo'"),
        ("speedrun.py", ["--steps", "demo=many"], "give it as NAME=STEPS, such as demo=800"),
        ("speedrun.py", ["--equal-tokens", "some"], "some tokens"),
        ("scale.py", ["--processes", "3"], "give 2 or more that divide the batch of 8"),
    ],
)
def test_a_wrong_argument_is_told_in_a_sentence(
    script: str, arguments: list[str], told: str
) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *arguments], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert told in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.parametrize("kind", [[], ["--overhead"]], ids=["peer", "overhead"])
def test_train_speed_compares_by_turns(kind: list[str]) -> None:
    options = ["--shape", "XS", "--rounds", "2", "--seconds", "0.2", "--threads", "1", *kind]
    result = run("train_speed.py", *options)
    names = set(result["tokens_per_second"])
    assert "ultrathink" in names
    assert set(result["ratio"]) == names - {"ultrathink"} != set()
    for speed in result["tokens_per_second"].values():
        assert 0 < speed["low"] <= speed["median"] <= speed["high"]
    assert set(result["mfu"]) == set(result["peak_memory_mib"]) == names
    assert all(0 < share < 1 for share in result["mfu"].values())
    assert all(mib > 50 for mib in result["peak_memory_mib"].values())


def test_startup_times_whole_processes() -> None:
    result = run("startup.py", "--rounds", "1", "--first-steps", "0")
    seconds = {name: figures["median"] for name, figures in result["seconds"].items()}
    assert 0 < seconds["python -c pass"] < seconds["import torch"]
    assert "ultrathink --help" in seconds


@pytest.mark.slow
@pytest.mark.compiled
def test_a_checkpoint_is_timed_beside_training_and_alone() -> None:
    result = run("checkpoint_stall.py", "--shape", "XS", "--checkpoints", "3", "--threads", "1")
    assert result["megabytes"] > 0
    for figure in ("copy_s", "write_s", "write_alone_s"):
        assert 0 < result[figure]["low"] <= result[figure]["median"]
    assert "stall_share" in result


@pytest.mark.slow
@pytest.mark.compiled
def test_processes_are_timed_beside_one_and_beside_plain_code() -> None:
    result = run("scale.py", "--shape", "XS", "--rounds", "2", "--seconds", "0.5")
    names = {"one process", "2 processes", "plain FSDP2"}
    assert set(result["tokens_per_second"]) == set(result["per_process"]) == names
    assert 0 < result["communication_share"] < 1
    assert result["beside_plain"] > 0
    assert all(mib > 50 for mib in result["peak_memory_mib"].values())


def test_a_speedrun_finds_the_fewest_steps(speedrun: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a contender whose score falls by 0.4 with every doubling of its steps."""
    tried: list[int] = []

    def trained(self: Any, steps: int, seed: int) -> dict[str, Any]:
        tried.append(steps)
        score = 2.0 - 0.4 * math.log2(steps / 600)
        return {"bits_per_byte": score, "minutes": steps / 400, "step": steps}

    monkeypatch.setattr(speedrun.Runner, "_run", trained)
    runner = speedrun.Runner("any", [], verbose=False)
    steps = runner.fewest_steps(1.5, seed=0)
    assert 1.5 - speedrun.NEAR_ENOUGH <= runner.train(steps, 0)["bits_per_byte"] <= 1.5
    assert len(tried) == len(set(tried)) <= 4  # nothing is trained twice


def test_every_contender_of_the_speedrun_is_a_configuration(speedrun: Any) -> None:
    contenders = yaml.safe_load(speedrun.FILE.read_text(encoding="utf-8"))
    assert {"demo", "plain"} <= set(contenders)
    for overrides in contenders.values():
        load_config("demo", overrides)
