"""Learning per compute: the fewest steps, and minutes, to a fixed score on `stdlib`.

    python benchmarks/speedrun.py --target 1.5                   # demo beside plain, seeds 0 1 2
    python benchmarks/speedrun.py --target 1.5 --steps demo=780 plain=2900    # without the search
    python benchmarks/speedrun.py --equal-tokens 1.6M --all --seeds 0         # what was tried

A run's schedule ends where the run does, so a curve that passes the target on its way is no answer:
each contender is given a number of steps, and its score is that of the last one, in bits per byte
of the held-out files. The fewest steps are searched for with the first seed (bits per byte are
nearly a line over the logarithm of steps) and then run with the others. Contenders are the entries
of speedrun.yaml: the overrides of the preset `demo` that make them. All go through the same trainer
and kernels; minutes are those of training, compilation in, as `ultrathink train` tells them.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from harness import parser, rows, setting, show, spread, start

from ultrathink.core.durations import Duration
from ultrathink.core.errors import UltrathinkError, suggestion

FILE = Path(__file__).parent / "speedrun.yaml"
TOKENS_PER_STEP = 8 * 256  # of `demo`; a contender with another batch takes as many tokens
NEAR_ENOUGH = 0.01  # bits per byte below the target at which the search ends
MOST_TRIALS = 6


def main() -> None:
    """Run the contenders and print what came out."""
    options = parser(__doc__)
    options.add_argument("--target", type=float, default=1.5, help="bits per byte to reach")
    options.add_argument("--equal-tokens", help="score all after so many tokens instead")
    options.add_argument("--steps", nargs="*", default=[], metavar="NAME=STEPS")
    options.add_argument("--only", nargs="*", default=["demo", "plain"], metavar="NAME")
    options.add_argument("--all", action="store_true", help="every contender of speedrun.yaml")
    options.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    options.add_argument("--verbose", action="store_true", help="report each run at its end")
    args = options.parse_args()
    contenders: dict[str, list[str]] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    names = list(contenders) if args.all else args.only
    given = steps_given(args.steps)
    equal_steps = steps_of(args.equal_tokens) if args.equal_tokens else None
    for name in (*names, *given):
        if name not in contenders:
            raise UltrathinkError(f"{name!r} is not in {FILE.name}. {suggestion(name, contenders)}")
    results = {}
    for name in names:
        runner = Runner(name, contenders[name], args.verbose)
        steps = equal_steps or given.get(name) or runner.fewest_steps(args.target, args.seeds[0])
        results[name] = summarize([runner.train(steps, seed) for seed in args.seeds], steps)
    result = {
        "benchmark": "speedrun",
        "target": None if args.equal_tokens else args.target,
        "seeds": args.seeds,
        "setting": setting(),
        "contenders": results,
    }
    show(result, describe(result), args.json)


def steps_of(tokens: str) -> int:
    """Steps of `demo` that take so many tokens (``1.6M``)."""
    try:
        return max(1, int(Duration.parse(f"{tokens} tokens").value) // TOKENS_PER_STEP)
    except ValueError as error:
        raise UltrathinkError(f"--equal-tokens {tokens!r}: {error}") from None


def steps_given(pairs: list[str]) -> dict[str, int]:
    """Steps by contender from ``NAME=STEPS`` pairs."""
    given = {}
    for pair in pairs:
        name, _, steps = pair.rpartition("=")
        if not name or not steps.isdigit() or int(steps) == 0:
            raise UltrathinkError(f"--steps {pair!r}: give it as NAME=STEPS, such as demo=800.")
        given[name] = int(steps)
    return given


class Runner:
    """Trains one contender, each number of steps and seed once."""

    def __init__(self, name: str, overrides: list[str], verbose: bool) -> None:
        self.name = name
        self.overrides = overrides
        self.verbose = verbose
        self._done: dict[tuple[int, int], dict[str, Any]] = {}

    def train(self, steps: int, seed: int) -> dict[str, Any]:
        """The result of ``ultrathink train --json`` after as many tokens as ``steps`` have."""
        if (steps, seed) not in self._done:
            result = self._run(steps, seed)
            self._done[steps, seed] = result
            if self.verbose:
                score, minutes = result["bits_per_byte"], result["minutes"]
                reported = (
                    f"{self.name}, {steps} steps, seed {seed}: {score:.4f} in {minutes:.2f} min"
                )
                print(reported, file=sys.stderr, flush=True)
        return self._done[steps, seed]

    def fewest_steps(self, target: float, seed: int) -> int:
        """Steps that reach ``target`` with ``NEAR_ENOUGH`` to spare at most."""
        steps, scores = 600, {}
        for _ in range(MOST_TRIALS):
            scores[steps] = self.train(steps, seed)["bits_per_byte"]
            if target - NEAR_ENOUGH <= scores[steps] <= target:
                break
            steps = next_trial(scores, target - NEAR_ENOUGH / 2)
        reached = [steps for steps, score in scores.items() if score <= target]
        if not reached:
            raise SystemExit(f"{self.name} did not reach {target} in {max(scores)} steps")
        return min(reached)

    def _run(self, steps: int, seed: int) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "ultrathink", "train", "demo", "--json"]
            command += [f"run.dir={folder}", f"run.seed={seed}", "training.compile=true"]
            command += [f"training.max_tokens={steps * TOKENS_PER_STEP}"]
            command += ["training.checkpoint.every_minutes=null", "training.eval.every_steps=null"]
            command += ["training.sample.prompts=[]", *self.overrides]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
        if done.returncode:
            raise SystemExit(f"{self.name}: {done.stderr.strip().splitlines()[-1]}")
        result: dict[str, Any] = json.loads(done.stdout)
        return result


def next_trial(scores: dict[int, float], target: float) -> int:
    """Where the line through the two trials nearest the target meets it."""
    nearest = sorted(scores, key=lambda steps: abs(scores[steps] - target))[:2]
    slope = -0.35  # bits per byte for twice the steps, until two trials tell
    if len(nearest) == 2:
        (a, b), (x, y) = nearest, (math.log2(nearest[0]), math.log2(nearest[1]))
        slope = min(-0.05, (scores[a] - scores[b]) / (x - y))
    doublings = (target - scores[nearest[0]]) / slope
    return round(nearest[0] * 2 ** max(-2.0, min(2.0, doublings)))


def summarize(runs: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Scores and minutes over the seeds."""
    scores = [run["bits_per_byte"] for run in runs]
    return {
        "steps": runs[0]["step"],
        "tokens": steps * TOKENS_PER_STEP,
        "minutes": spread([run["minutes"] for run in runs]),
        "bits_per_byte": scores,
        "mean": statistics.mean(scores),
        "deviation": statistics.stdev(scores) if len(scores) > 1 else None,
    }


def describe(result: dict[str, Any]) -> str:
    """The result as a table."""
    lines = []
    for name, figures in result["contenders"].items():
        deviation = figures["deviation"]
        lines.append(
            (
                name,
                f"{figures['steps']:,}",
                f"{figures['tokens'] / 1e6:.2f}M",
                f"{figures['minutes']['median']:.2f}",
                f"{figures['mean']:.3f}",
                "" if deviation is None else f"{deviation:.3f}",
                " ".join(f"{score:.3f}" for score in figures["bits_per_byte"]),
            )
        )
    header = ("", "steps", "tokens", "minutes", "bits/byte", "deviation", "by seed")
    target = result["target"]
    goal = "equal tokens" if target is None else f"to {target} bits per byte"
    return f"{goal}, seeds {result['seeds']}\n{rows(header, lines)}"


if __name__ == "__main__":
    start(main)
