"""Kill a process of a run on two at random moments; it must go on by itself, every time.

    python -m tests.stress.launch_kill                ten times: some three minutes
    python -m tests.stress.launch_kill --times 30 --seed 7

The killed process is the first or the second, at a random step. Each run must end by itself with
status 0 and equal an undisturbed run in every logged line and every weight. Ends with status 1
where one does not.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.e2e.launching import TINY, Launched
from tests.stress.evidence import row_differences, rows, tensors

STEPS = 40
WORDS = (
    "debug",
    *TINY,
    f"training.max_steps={STEPS}",
    "training.checkpoint={every_steps: 5, keep: 3}",
)


def differences(reference: Path, other: Path) -> list[str]:
    """Where the runs differ: logged lines, and tensors of the last checkpoint."""
    here, there = (tensors(run / "checkpoints" / "last") for run in (reference, other))
    return row_differences(rows(reference), rows(other)) + [
        f"{name} differs"
        for name in here
        if name.startswith("model/") and not torch.equal(here[name], there[name])
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chance, failures = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "whole").mkdir()
        whole = Launched(place / "whole", *WORDS)
        assert whole.status() == 0, whole.stderr
        for number in range(args.times):
            (place / str(number)).mkdir()
            run = Launched(place / str(number), *WORDS)
            rank, step = chance.randrange(2), chance.randrange(1, STEPS - 2)
            try:
                run.wait_for_step(step)
                time.sleep(chance.random() * 0.02)
                os.kill(run.workers()[rank], signal.SIGKILL)
                began = time.monotonic()
                status = run.status()
                problems = [f"status {status}: {run.stderr}"] if status else []
                problems += differences(whole.run, run.run) if not status else []
            except AssertionError as error:
                problems, began = [str(error)], time.monotonic()
            finally:
                run.kill()
            failures += bool(problems)
            reported = "; ".join(problems) if problems else "continued, the same weights"
            print(
                f"{number + 1:>3}  process {rank} killed behind step {step:>2}: {reported} "
                f"({time.monotonic() - began:.1f} s)",
                flush=True,
            )
    print(f"{args.times - failures} of {args.times}")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
