"""How long a user waits before anything happens.

    python benchmarks/startup.py
    python benchmarks/startup.py --json

Whole processes, from their start to their end. The first step of `demo` is timed to its line in
`metrics.jsonl`, with the text tokenized and the step compiled by a run before: what is kept between
runs, and what is not, is then as it is for a user's second run.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from harness import parser, rows, setting, show, spread, start

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import ultrathink": [sys.executable, "-c", "import ultrathink"],
    "ultrathink --help": [sys.executable, "-m", "ultrathink", "--help"],
    "ultrathink config show demo": [sys.executable, "-m", "ultrathink", "config", "show", "demo"],
    "import torch": [sys.executable, "-c", "import torch"],
}
FIRST_STEP = "first step of demo"
POLL_S = 0.01
PATIENCE_S = 300.0


def main() -> None:
    """Time the commands and print what came out."""
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--first-steps", type=int, default=3, help="starts of `demo` to time")
    args = options.parse_args()
    timed: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(args.rounds):
        for name, command in COMMANDS.items():
            timed[name].append(seconds_of(lambda command=command: finish(command)))
    if args.first_steps:
        seconds_to_first_step()  # leaves the caches warm
        timed[FIRST_STEP] = [seconds_to_first_step() for _ in range(args.first_steps)]
    result = {
        "benchmark": "startup",
        "setting": setting(),
        "seconds": {name: spread(figures) for name, figures in timed.items()},
    }
    lines = [
        (name, *(f"{figures[key]:.2f}" for key in ("median", "low", "high")))
        for name, figures in result["seconds"].items()
    ]
    show(result, rows(("seconds", "median", "low", "high"), lines), args.json)


def seconds_of(work: Callable[[], object]) -> float:
    """How long ``work`` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def finish(command: list[str]) -> None:
    """Run a command to its end; what it prints is not looked at."""
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def seconds_to_first_step() -> float:
    """From the start of ``ultrathink train`` to the first line of its metrics."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        command = [sys.executable, "-m", "ultrathink", "train", f"run.dir={folder}"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while time.perf_counter() - began < PATIENCE_S and process.poll() is None:
                if _has_stepped(Path(folder) / "demo" / "metrics.jsonl"):
                    return time.perf_counter() - began
                time.sleep(POLL_S)
        finally:
            process.kill()
            process.wait()
    raise SystemExit("`ultrathink train` took no step; run it to see why")


def _has_stepped(metrics: Path) -> bool:
    try:
        first = metrics.read_text(encoding="utf-8").splitlines()[:1]
    except FileNotFoundError:
        return False
    return bool(first) and json.loads(first[0])["step"] >= 1


if __name__ == "__main__":
    start(main)
