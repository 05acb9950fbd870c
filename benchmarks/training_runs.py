"""Short runs on `stdlib` that benchmarks compare: each a process, some at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


def train_all(
    runs: Mapping[str, Sequence[str]], *, preset: str, processes: int, verbose: bool
) -> dict[str, dict[str, Any]]:
    """Train ``preset`` with the overrides of each run; what each came to, by its label.

    The threads of the machine are divided among ``processes`` runs at a time.
    """
    threads = max(1, (os.cpu_count() or 1) // processes)

    def train(label: str) -> dict[str, Any]:
        arguments = json.dumps({"preset": preset, "overrides": list(runs[label])})
        done = subprocess.run(
            [sys.executable, __file__, arguments],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        if done.returncode:
            raise SystemExit(f"{label}: {done.stderr.strip().splitlines()[-1]}")
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        if verbose:
            figures = f"{result['loss']:.4f} nats, {result['bits_per_byte']:.4f} bits per byte"
            reported = f"{label}: {figures}, {result['step']} steps, {result['minutes']:.2f} min"
            print(reported, file=sys.stderr, flush=True)
        return result

    with ThreadPoolExecutor(processes) as pool:
        return dict(zip(runs, pool.map(train, runs), strict=True))


def run(preset: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Train in this process: scores on all held-out text, and how it spreads over experts."""
    from ultrathink import build_trainer, load_config
    from ultrathink.model.flops import count_parameters, flops_per_token

    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            preset,
            [
                f"run.dir={folder}",
                "training.eval.every_steps=null",
                "training.checkpoint.every_minutes=null",
                "training.checkpoint.every_steps=null",
                "training.sample.prompts=[]",
                "monitoring.sinks=[jsonl]",
                *overrides,
            ],
        )
        trainer = build_trainer(config)
        trainer.fit()
        lines = (Path(trainer.run.path) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    scored = json.loads(lines[-1])
    counts = count_parameters(trainer.model)
    return {
        "step": trainer.progress.step,
        "steps_taken": trainer.clock.num_steps,  # those that were undone included
        "lr_scale": trainer.settings.lr_scale,
        "tokens": trainer.progress.tokens,
        "minutes": trainer.progress.elapsed_s / 60,
        "loss": scored["loss"],
        "bits_per_byte": scored["bits_per_byte"],
        "parameters": counts.total,
        "flops_per_token": flops_per_token(config.model, config.data.seq_len),
        "path_losses": {k[5:]: v for k, v in scored.items() if k.startswith("loss/")},
        "agreement": agreement(trainer),
        **held_out_load(trainer),
    }


def agreement(trainer: Any) -> dict[str, float]:
    """The share of held-out tokens for which each scored path agrees with the whole model."""
    import torch

    model, held_out = trainer.model, trainer.objective.held_out
    paths = trainer.objective.scored_paths
    same, number = dict.fromkeys(paths, 0), 0
    model.eval()
    with torch.no_grad():
        for batch in held_out.batches(8, trainer.training.eval.max_tokens) if paths else ():
            whole = model(batch.input_ids).logits.argmax(-1)
            number += whole.numel()
            for path in paths:
                found = model(batch.input_ids, path=path).logits.argmax(-1)
                same[path] += int((found == whole).sum())
    return {path: count / number for path, count in same.items()}


def held_out_load(trainer: Any) -> dict[str, Any]:
    """How the text that was scored spreads over the experts of each group, in evaluation mode."""
    import torch

    from ultrathink.training.experts import read_experts
    from ultrathink.training.stepping import StepResult

    model, held_out = trainer.model, trainer.objective.held_out
    if not model.expert_layers():
        return {}
    model.eval()
    stats: dict[str, Any] = {}
    num_tokens = 0
    with torch.no_grad():
        for batch in held_out.batches(8, trainer.training.eval.max_tokens):
            output = model(batch.input_ids, labels=batch.labels)
            num_tokens += int(output.num_tokens)
            for name, value in output.stats.items():
                stats[name] = stats.get(name, 0) + value
    result = StepResult(0.0, {}, 0.0, num_tokens, False, stats)
    statistics = read_experts(model, result, trainer.world)
    assert statistics is not None, "a model with experts"
    groups = {
        name: {
            "gini": figures["gini"].tolist(),
            "gini_of_noise": float(figures["gini_of_noise"][0]),
            "utilization": figures["utilization"].tolist(),
            "dead": int(figures["dead"].sum()),
        }
        for name, figures in statistics.figures.items()
    }
    return {"scored_tokens": num_tokens, "groups": groups}


if __name__ == "__main__":
    print(json.dumps(run(**json.loads(sys.argv[1]))))
