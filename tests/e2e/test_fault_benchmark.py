"""The fault benchmark runs, and continues where it was stopped."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ultrathink import build_trainer, load_config

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "faults.py"
SMALL = ("model.hidden_size=32", "data.seq_len=32", "training.eval.max_tokens=1024")
SIZE = ("--steps", "8", "24", "--healthy-steps", "20", "--scored-tokens", "2048")

# Divides the rate by what it was multiplied with, as soon as that is seen.
STEADY = """
from ultrathink.training.changes import SetLearningRateFactor


class Steady:
    def __init__(self):
        self.usual = None

    def at_boundary(self, report, control):
        self.usual = self.usual or report.lr
        if report.lr > 2 * self.usual:
            control.request(SetLearningRateFactor(self.usual / report.lr), reason="the rate jumped")

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass

CONTROLLER = Steady
"""
ZEROED = """
import torch
from fault_injection import Fault

class ZeroedWeights(Fault):
    '''All weights are lost.'''
    name = "zeroed"
    group = "loss"

    @torch.no_grad()
    def before_update(self, moment):
        for weight in moment.model.parameters():
            weight.zero_()

FAULT = ZeroedWeights
"""


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*arguments: str) -> tuple[Any, str]:
    """The JSON object that the benchmark prints, and what it tells meanwhile."""
    process = start(*arguments, "--json")
    out, reported = process.communicate(timeout=300)
    assert process.returncode == 0, reported
    return json.loads(out), reported


def write_examples_of_documentation(folder: Path) -> None:
    """``my_fault.py`` and ``my_controller.py``, as the documentation shows them."""
    text = (SCRIPT.parents[1] / "docs" / "faults.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", text, re.DOTALL)
    assert [name for name, _ in blocks] == ["my_fault.py", "my_controller.py"]
    for name, code in blocks:
        (folder / name).write_text(code)


def test_faults_and_controllers_meet(tmp_path: Path) -> None:
    (tmp_path / "steady.py").write_text(STEADY)
    (tmp_path / "zeroed.py").write_text(ZEROED)
    write_examples_of_documentation(tmp_path)
    out = tmp_path / "out"
    arguments = [
        *("--quick", "--out", str(out), "--processes", "2", *SIZE),
        *("--only", "lr_x30", "router_collapse", "memory_leak", "zeroed", "half_the_labels"),
        *("out_of_memory_backward", "out_of_memory_step"),
        *("--controllers", "my_controller", "steady"),
        *("--controller", str(tmp_path / "my_controller.py")),
        *("--controller", str(tmp_path / "steady.py")),
        *("--fault", str(tmp_path / "my_fault.py"), "--fault", str(tmp_path / "zeroed.py")),
        *("--set", *SMALL),
    ]
    result, reported = run(*arguments)
    total = 2 + 3 * (2 + 7 + 3)  # snapshots; clean, struck and healthy runs of each controller
    assert f"[{total}/{total}]" in reported
    assert "about 0 min to go" in reported
    assert set(result["controllers"]) == {"none", "my_controller", "steady"}
    keys = {
        *("recall", "delay_steps_median", "false_alarms_per_10k", "failed_share"),
        *("recovered_share", "final_loss_ratio_median"),
    }
    assert all(keys <= figures.keys() for figures in result["controllers"].values())
    assert result["controllers"]["none"]["num_runs"] == 4
    assert result["controllers"]["none"]["clean_loss_ratio_median"] == 1
    rate = result["faults"]["lr_x30"]["controllers"]
    assert rate["none"]["final_loss_ratio_median"] > 1.01
    assert rate["steady"]["recall"] == 1
    assert rate["steady"]["delay_steps_median"] == 1
    assert rate["steady"]["final_loss_ratio_median"] < rate["none"]["final_loss_ratio_median"]
    assert rate["none"]["recall"] == 0
    zeroed = result["faults"]["zeroed"]["controllers"]["none"]
    assert zeroed["failed_share"] == 1
    passes, update = (
        result["faults"][f"out_of_memory_{where}"]["controllers"]["none"]
        for where in ("backward", "step")
    )
    assert passes["died_share"] == 0
    assert passes["final_loss_ratio_median"] == pytest.approx(1, abs=1e-3)
    assert update["died_share"] == 1
    assert "the update ran out of memory" in update["died_of"][0]
    assert result["faults"]["memory_leak"]["controllers"]["none"]["memory_growth_gib"] > 0.005
    assert result["detectors"]["healthy_steps"] == 2 * 24 + 20
    check_signals(out)
    before = {file: file.stat().st_mtime_ns for file in out.rglob("result.json")}
    again, reported = run(*arguments)
    assert reported == ""  # nothing was left to do
    assert before == {file: file.stat().st_mtime_ns for file in out.rglob("result.json")}
    for key in ("controllers", "faults", "detectors"):
        assert again[key] == result[key]
    (tmp_path / "zeroed.py").write_text(ZEROED + "# now another file")
    reported = run(*arguments)[1]
    assert reported.count("zeroed, ") == len(reported.splitlines()) == 3


def check_signals(out: Path) -> None:
    """What a run records continues where the snapshot's ends, under the standard names."""
    first, then = (
        [json.loads(line) for line in (out / folder / "signals.jsonl").read_text().splitlines()]
        for folder in ("snapshots/moe-seed0", "runs/clean-moe/none-seed0")
    )
    assert [line["step"] for line in first + then] == list(range(1, 25))
    names = {
        *("loss", "grad_norm", "lr", "step_time", "data_wait", "tokens_per_sec", "memory"),
        *("skipped_steps", "experts/knowledge/gini"),
    }
    assert all(names <= line.keys() for line in first + then)
    assert "val_loss" in then[-1]


def test_a_stopped_benchmark_continues_and_its_twin_is_the_uncut_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--out", str(out), "--seeds", "0", *SIZE, "--only", "lr_x30", "tiny_lr"]
    arguments += ["--controllers", "none", "--set", *SMALL]
    process = start(*arguments)
    assert process.stderr is not None
    for _ in range(2):
        process.stderr.readline()  # two runs are done
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    done = {file: file.stat().st_mtime_ns for file in out.rglob("result.json")}
    assert 2 <= len(done) < 7
    result, reported = run(*arguments)
    assert len(reported.splitlines()) == 7 - len(done)
    assert {file: file.stat().st_mtime_ns for file in done} == done
    assert set(result["faults"]) == {"lr_x30", "tiny_lr"}
    # The clean run from the snapshot is, bit for bit, the one that was never stopped.
    sys.path.insert(0, str(SCRIPT.parent))
    from fault_runs import Recorder, score
    from fault_setting import FULL

    setting = json.loads((out / "setting.json").read_text())
    size = type(FULL)(**{**setting, "overrides": tuple(setting["overrides"])})
    recorder = Recorder(tmp_path / "signals.jsonl")
    config = load_config("debug", [*size.config("dense", 24), f"run.dir={tmp_path}"])
    trainer = build_trainer(config.replace({"run.seed": 0}, origin="test"), callbacks=[recorder])
    trainer.fit()
    clean = out / "runs/clean-dense/none-seed0"
    lines = [json.loads(line) for line in (clean / "signals.jsonl").read_text().splitlines()]
    uncut = [json.loads(line) for line in (tmp_path / "signals.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [line["loss"] for line in uncut[8:]]
    assert json.loads((clean / "result.json").read_text())["loss"] == score(trainer, size)
