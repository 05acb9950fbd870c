"""The benchmarks run and print what they say; the figures themselves are not looked at."""

from __future__ import annotations

import gzip
import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ultrathink.config import load_config

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script: str, *arguments: str) -> Any:
    """The JSON object that a benchmark prints; compiled steps are tested elsewhere."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *arguments, "--json"],
        env={**os.environ, "TORCHDYNAMO_DISABLE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {"date", "processor", "threads", "gpus"} <= set(result["setting"])
    return result


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A script as a module, by its name."""

    def imported(name: str) -> Any:
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
        return found

    return imported


@pytest.fixture
def speedrun(module: Callable[[str], Any]) -> Any:
    """``speedrun.py``."""
    return module("speedrun")


@pytest.mark.parametrize(
    ("script", "arguments", "reported"),
    [
        ("train_speed", ["--device", "cuda:77"], "training.device = 'cuda:77'"),
        ("memory", ["--device", "gpu"], "no such kind of device; use auto, cpu"),
        ("speedrun", ["--only", "dmeo"], "'dmeo' is not in speedrun.yaml. Did you mean 'demo'"),
        ("speedrun", ["--steps", "demo=many"], "give it as NAME=STEPS, such as demo=800"),
        ("speedrun", ["--equal-tokens", "some"], "some tokens"),
        ("sparse_balance", ["--only", "bais"], "no way to balance. Did you mean 'bias'"),
        ("sparse_quality", ["--only", "dens"], "no model 'dens'. Did you mean 'dense'"),
        ("scale", ["--processes", "3"], "give 2 or more that divide the batch of 8"),
        ("faults", ["--only", "lr_10x"], "'lr_10x' is no fault. Did you mean 'lr_x10'?"),
        ("faults", ["--steps", "9", "9"], "the snapshot must come after step 0 and before"),
        ("faults", ["--processes", "0"], "--processes 0: give 1 or more."),
        ("faults", ["--out", "{here}"], "{here} is not empty and holds no results; give another"),
    ],
)
def test_a_wrong_argument_is_reported_in_a_sentence(
    module: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    script: str,
    arguments: list[str],
    reported: str,
) -> None:
    (tmp_path / "x.py").write_text("x = 1")
    words = [argument.format(here=tmp_path) for argument in arguments]
    found = module(script)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *words])
    with pytest.raises(SystemExit) as ended:
        found.start(found.main)
    assert str(ended.value).startswith("error: ")
    assert reported.format(here=tmp_path) in str(ended.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("kind", [[], ["--overhead"]], ids=["peer", "overhead"])
def test_train_speed_compares_by_turns(kind: list[str]) -> None:
    options = ["--shape", "XS", "--rounds", "1", "--seconds", "0.2", "--threads", "1", *kind]
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


def test_a_second_start_reads_next_to_nothing() -> None:
    result = run("second_start.py", "--size-gb", "0.01", "--files", "4", "--rounds", "1")
    assert set(result["seconds"]) == {"small", "large"}
    assert 0 < result["gate"]["share_read"] < 0.01


def test_a_checkpoint_is_timed_beside_training_and_alone() -> None:
    result = run("checkpoint_stall.py", "--shape", "XS", "--checkpoints", "2", "--threads", "1")
    assert result["megabytes"] > 0
    for figure in ("copy_s", "write_s", "write_alone_s"):
        assert 0 < result[figure]["low"] <= result[figure]["median"]
    assert "stall_share" in result


def test_processes_are_timed_beside_one_and_beside_plain_code() -> None:
    result = run("scale.py", "--shape", "XS", "--rounds", "1", "--seconds", "0.2")
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


def test_experts_are_timed_beside_mixtral_and_a_dense_twin() -> None:
    options = ["--shape", "XS-moe", "--rounds", "1", "--seconds", "0.2", "--threads", "1"]
    result = run("sparse_speed.py", *options)
    names = {"ultrathink", "dense twin", "Mixtral grouped_mm"}
    assert set(result["tokens_per_second"]) == set(result["mfu"]) == names
    assert set(result["ratio"]) == names - {"ultrathink"}


SMALL = (
    "training.compile=false",
    "model.hidden_size=32",
    "model.num_layers=1",
    "model.intermediate_size=64",
    "data.seq_len=64",
    "training.schedule.warmup=1",
    "training.eval.max_tokens=4096",
)


def test_ways_to_balance_are_compared_with_none() -> None:
    options = ["--only", "bias", "--seeds", "0", "--steps", "4", "--quiet", "--set"]
    result = run("sparse_balance.py", *options, *SMALL, "model.moe.intermediate_size=8")
    assert set(result["ways"]) == {"bias", "none"}
    assert result["scored_tokens"] == 4096
    assert result["ways"]["none"]["change"] == 0
    for figures in result["ways"].values():
        assert set(figures["groups"]) == {"knowledge", "skill", "meta", "safety"}
        assert all(
            0 < group["gini_of_noise"] < group["gini"] for group in figures["groups"].values()
        )


def test_what_surgery_costs() -> None:
    options = ["--steps", "2", "--more", "1", "--scored", "1024", "--set"]
    sizes = ["model.hidden_size=32", "model.num_heads=2", "data.seq_len=64"]
    result = run("surgery.py", *options, *sizes, "training.batch_size=2")
    assert result["logit_change"] <= 1e-5
    assert result["split"] == pytest.approx(result["loss"], rel=1e-5)
    assert result["dropped_later"] != result["later"]


def test_what_watching_costs() -> None:
    options = ["--preset", "debug", "--steps", "12", "--threads", "1", "--set"]
    result = run("watch_cost.py", *options, "training.log_every=4")
    assert 0 < result["watcher_ms"] < result["step_ms"]
    assert 0 < result["norms_ms"] < result["step_ms"]
    assert result["share"] < 1


def test_models_are_compared_at_equal_work() -> None:
    options = ["--only", "dense", "8 experts", "--seeds", "0", "--steps", "3", "--minutes", "0"]
    result = run("sparse_quality.py", *options, "--quiet", "--set", *SMALL)
    models = result["ways"]["equal work"]
    assert models["8 experts"]["parameters"] > 1.2 * models["dense"]["parameters"]
    assert all(figures["steps"] == 3 for figures in models.values())


def test_mutual_information_of_sources_and_experts(module: Any) -> None:
    specialization = module("specialization")
    apart = [np.array([[6.0, 0.0]]), np.array([[0.0, 6.0]]), np.array([[6.0, 0.0]])]
    assert specialization.information(apart, ["a", "b", "a"]) == pytest.approx(1.0)
    alike = [np.array([[3.0, 3.0]])] * 3
    assert specialization.information(alike, ["a", "b", "a"]) == pytest.approx(0.0, abs=1e-9)
    mixed = [np.array([[3.0, 1.0]]), np.array([[1.0, 3.0]])]
    joint = np.array([[3, 1], [1, 3]]) / 8  # H(S) = H(E) = ln 2
    mutual = sum(p * math.log(p / 0.25) for p in joint.flatten())
    assert specialization.information(mixed, ["a", "b"]) == pytest.approx(mutual / math.log(2))


def test_what_a_group_is_worth_for_each_source(
    module: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """On generated texts in place of the real ones; models are trained, but not for long."""
    specialization, named = module("specialization"), sys.modules["named_experts"]
    each = {"type": "dummy", "num_documents": 20, "num_words": 30}
    sources = {name: {**each, "seed": n} for n, name in enumerate(named.GROUPS)}
    monkeypatch.setattr(named, "prepare", lambda *_: sources)
    words = "--ways gates targets --seeds 3 --steps 4 --held-out 64 --json --set"
    tiny = ("tokenizer=byte", "model.hidden_size=32", "data.seq_len=16", "training.compile=false")
    monkeypatch.setattr(sys, "argv", ["specialization.py", *words.split(), *tiny])
    specialization.main()
    result = json.loads(capsys.readouterr().out)
    assert set(result["gate"]) == {"lead", "cost_beside_gates", "holds"}
    for way in ("gates", "targets"):
        [one] = result["ways"][way]
        assert np.array(one["costs"]).shape == (4, 4)
        assert one["lead"] == named.lead(one["costs"])
        for figures in one["groups"].values():
            assert 0 <= figures["domain"] <= 1 >= figures["co_activation"] > 0
            assert figures["even_share"] <= figures["vocabulary"] <= 1 >= figures["saturation"]
    assert "lead of the diagonal" in specialization.describe_training(result)
    monkeypatch.setattr(sys, "argv", ["specialization.py", "--ways", "target"])
    with pytest.raises(SystemExit, match=r"--ways target: no such way of training; known: plain"):
        specialization.start(specialization.main)


def test_the_lead_of_the_diagonal(module: Callable[[str], Any]) -> None:
    module("specialization")
    lead = sys.modules["named_experts"].lead
    assert lead([[6.0, 2.0], [1.0, 3.0]]) == 1.5
    assert lead([[6.0, -1.0], [0.0, 3.0]]) == math.inf
    assert lead([[6.0, 2.0], [1.0, 0.0]]) == 0.0


def test_the_texts_of_the_groups(module: Callable[[str], Any], tmp_path: Path) -> None:
    module("specialization")
    named = sys.modules["named_experts"]
    with pytest.raises(Exception, match=r"text/world192\.txt is not there.*give the folder"):
        named.prepare(tmp_path, tmp_path)
    for name in (name for names in named.FILES.values() for name in names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        row = {"question": "What?", "answer": "That.", "chosen": "\n\nHuman: Hi", "rejected": "x"}
        line = json.dumps(row).encode()
        (tmp_path / name).write_bytes(gzip.compress(line) if name.endswith(".gz") else line)
    sources = named.prepare(tmp_path, tmp_path)
    assert list(sources) == list(named.GROUPS)
    texts = [
        json.loads(Path(sources[name]["path"]).read_text(encoding="utf-8"))["text"]
        for name in ("meta", "safety")
    ]
    assert texts == ["What?\nThat.\n", "Human: Hi\n"]


def test_measures_of_routing_are_those_of_counting(module: Callable[[str], Any]) -> None:
    """Against counting token by token."""
    module("specialization")
    found = sys.modules["routing_measures"]
    random = np.random.default_rng(0)
    N, slots = 200, slice(2, 7)
    chosen = np.stack([random.permutation(5)[:2] for _ in range(N)])
    others = random.integers(0, 2, (N, 1))  # the experts of another group, slots 0 and 1
    sources, ids = random.integers(0, 3, N), random.integers(0, 30, N)
    apart = []
    for source in range(3):
        mine = [row for row, own in zip(chosen, sources, strict=True) if own == source]
        shares = [sum(expert in row for row in mine) / len(mine) for expert in range(5)]
        apart.append(sum(abs(share - 0.4) for share in shares) / 2 / (2 * 0.6))
    assert found.domain(chosen, sources, 5) == pytest.approx(np.mean(apart))
    assert found.domain(np.array([[0, 1]] * 4), np.zeros(4, dtype=int), 5) == pytest.approx(1.0)
    largest = []
    for token in range(30):
        rows = [row for row, own in zip(chosen, ids, strict=True) if own == token]
        if len(rows) >= found.LEAST:
            largest.append(max(sum(e in row for row in rows) for e in range(5)) / len(rows))
    assert found.vocabulary(chosen, ids, 5) == pytest.approx(np.mean(largest))
    every = [set(row) for row in np.concatenate([others, chosen + 2], 1).tolist()]
    together = []
    for expert in range(2, 7):
        mine = [row for row in every if expert in row]
        pairs = [sum(other in row for row in mine) for other in range(7) if other != expert]
        together.append(max(pairs) / len(mine))
    joined = np.concatenate([others, chosen + 2], 1)
    assert found.co_activation(joined, slots) == pytest.approx(np.mean(together))
