"""Kill and resume a run of every combination of what changes how a run continues.

    python -m tests.stress.matrix                32 combinations: about ten minutes
    python -m tests.stress.matrix --compiled     the same with the compiled model as well

Each is killed with SIGKILL behind its last checkpoint, resumed in a new process, and compared with
an undisturbed run, bit for bit. Ends with status 1 where one differs.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.stress import evidence
from tests.stress.process import Session

# Factor -> its two values, each as overrides.
FACTORS: dict[str, tuple[str, str]] = {
    "accumulation": ("training.micro_batch_size=4", "training.micro_batch_size=1"),
    "packing": ("data.packing.enabled=true", "data.packing.enabled=false"),
    "workers": ("data.num_workers=0", "data.num_workers=2"),
    "optimizer": (
        "training.optimizer={type: adamw, lr: 0.01}",
        "training.optimizer={type: muon, lr: 0.01}",
    ),
    "precision": ("training.precision=fp32", "training.precision=bf16"),
}
COMMON = (
    "model.hidden_size=32",
    "model.num_heads=2",
    "model.dropout=0.1",
    "data.seq_len=32",
    "data.train=[{type: dummy, name: a, weight: 3, num_documents: 60, num_words: 40}, "
    "{type: dummy, name: b, seed: 5, num_documents: 60, num_words: 40}]",
    "training.batch_size=4",
    "training.schedule={type: wsd, warmup: 2, decay: 0.5}",
    "training.eval.every_steps=4",
    "training.log_every=1",
    "training.sample.prompts=[]",
    "monitoring.sinks=[jsonl]",
)
COMPILED = ("training.compile=true", "model.attention.backend=blocks")
EVERY_STEPS = 6  # between checkpoints
KILL_STEP = 7

Combination = tuple[str, ...]


def combinations() -> list[Combination]:
    """Every combination of the factors' values, as overrides."""
    return list(itertools.product(*FACTORS.values()))


def kill_and_resume(place: Path, name: str, options: Sequence[str]) -> list[str]:
    """Differences between an undisturbed run and one killed behind its checkpoint and resumed."""
    words = [
        "train",
        "debug",
        *COMMON,
        f"training.checkpoint={{every_steps: {EVERY_STEPS}, keep: 9}}",
        *options,
    ]
    runs = place / "runs"
    sessions: list[Session] = []

    def start(folder: str, *words: str) -> Session:
        sessions.append(Session(place, runs / folder, *words, "--json"))
        return sessions[-1]

    try:
        start(f"{name}-whole", *words, "training.max_steps=12", f"run.name={name}-whole").finish()
        killed = start(name, *words, "training.max_steps=12", f"run.name={name}")
        if not killed.wait_until(lambda: killed.step() >= KILL_STEP):
            raise RuntimeError(killed.complaint())
        killed.kill()
        found = evidence.unsound(killed.run)
        if not evidence.steps(killed.run):
            return [*found, f"no checkpoint was left at step {killed.step()}"]
        start(name, "train", "--resume", name).finish()
    finally:
        for session in sessions:
            session.kill()
    return found + evidence.differences(runs / f"{name}-whole", runs / name)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 1 where a combination differs."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.stress.matrix", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--compiled", action="store_true", help="each compiled as well")
    args = parser.parse_args(argv)
    todo = list(_labelled(args.compiled))
    num_different = 0
    with tempfile.TemporaryDirectory(prefix="ultrathink-matrix-") as folder:
        for number, (label, options) in enumerate(todo, start=1):
            found = kill_and_resume(Path(folder), f"run{number}", options)
            num_different += bool(found)
            print(f"{number}/{len(todo)} {label}: {'; '.join(found[:3]) or 'equal'}", flush=True)
    print(f"{len(todo) - num_different} of {len(todo)} combinations are equal, bit for bit")
    return 1 if num_different else 0


def _labelled(compiled: bool) -> Iterator[tuple[str, Combination]]:
    for code in ((), COMPILED) if compiled else ((),):
        for combination in combinations():
            yield " ".join([*combination, *code]), (*combination, *code)


if __name__ == "__main__":
    sys.exit(main())
