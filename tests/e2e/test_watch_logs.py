"""The benchmark of the watcher on logs: what it counts, on logs that are made up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "watch_logs.py"


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """A healthy log, one with a spike, and a file that is no log."""
    rng = np.random.default_rng(0)
    steps = np.arange(1, 801)
    loss = (2 + 8 * steps**-0.4) * np.exp(0.01 * rng.standard_normal(800))
    spiky = loss.copy()
    spiky[400:405] *= 1.4
    for name, values in (("healthy.csv", loss), ("spiky.csv", spiky)):
        lines = [f"{step},{value:.5f}" for step, value in zip(steps, values, strict=True)]
        (tmp_path / name).write_text("\n".join(["step,loss", *lines]), encoding="utf-8")
    (tmp_path / "notes.txt").write_text("nothing of the kind", encoding="utf-8")
    return tmp_path


def test_it_counts_alarms_forecasts_and_time_of_each_log(logs: Path) -> None:
    done = run(logs, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {"date", "processor", "threads", "gpus"} <= set(result["setting"])
    assert set(result["logs"]) == {"healthy.csv", "spiky.csv"}
    assert set(result["left_out"]) == {"notes.txt"}
    healthy, spiky = result["logs"]["healthy.csv"], result["logs"]["spiky.csv"]
    assert (healthy["steps"], healthy["logged_steps"]) == (800, 800)
    assert healthy["alarms_per_10k_steps"] == 0
    assert spiky["alarms_per_10k_steps"] == pytest.approx(12.5)
    assert [(event["kind"], event["step"]) for event in spiky["alarms"]] == [("loss_spike", 401)]
    assert healthy["forecasts"] >= 7
    assert healthy["forecasts_held"] >= 6
    assert healthy["microseconds_per_step"] > 0


def test_it_prints_a_table_and_says_what_it_left_out(logs: Path) -> None:
    done = run(logs)
    assert done.returncode == 0, done.stderr
    assert "forecasts held in all:" in done.stdout
    assert any(line.startswith("spiky.csv") for line in done.stdout.splitlines())
    assert "notes.txt is left out" in done.stderr


def test_without_a_log_it_says_so(logs: Path) -> None:
    done = run(logs / "notes.txt")
    assert done.returncode == 1
    assert "none of the files is a training log" in done.stderr
